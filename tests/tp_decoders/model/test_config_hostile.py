"""A config.json that is broken or means harm: one line that says so, before anything is built or allocated."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launch.main import main
from parallel.errors import CheckpointError, ConfigError, TpError
from tp_decoders import build, load, save
from tp_decoders.checkpoint.load_save import initialise
from tp_decoders.files.json_files import MOST_BYTES
from tp_decoders.registry import config_from_hf, read_config

SMALL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 31, "n_positions": 32},
    "gpt_bigcode": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 31, "n_positions": 32},
    "gpt_neox": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 31, "rotary_pct": 0.5,
        "intermediate_size": 32, "max_position_embeddings": 32,
    },
    "gpt_neox_japanese": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 31,
        "max_position_embeddings": 32,
    },
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 31, "max_seq_len": 32},
    "qwen3": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 31,
        "head_dim": 8, "intermediate_size": 32, "max_position_embeddings": 32, "sliding_window": None,
        "use_sliding_window": False, "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
    },
}  # fmt: skip

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 548105171\n"

CONTENTS: dict[str, tuple[bytes, str]] = {
    "nested 100,000 deep": (b'{"a":' * 100_000, "nested too deeply"),
    "a list nested 100,000 deep": (b"[" * 100_000, "nested too deeply"),
    "binary": (bytes(range(256)), "not valid JSON"),
    "nothing": (b"", "not valid JSON"),
    "cut short": (b'{"model_type": "gpt2"', "not valid JSON"),
    "a number of 10,000 digits": (b'{"model_type": "gpt2", "n_layer": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    "a list": (b"[1, 2]", "should hold a JSON object, not list"),
    "a key twice": (b'{"model_type": "gpt2", "n_layer": 2, "n_layer": 3}', "'n_layer' is given twice"),
    "a model_type of the wrong kind": (b'{"model_type": ["gpt2"]}', "is not one of this project's families"),
    "a pointer": (POINTER, "config.json is a Git LFS pointer in the file's place: run `git lfs pull`"),
    "UTF-16": ('{"model_type": "gpt2"}'.encode("utf-16"), "config.json is not valid JSON: 'utf-8' codec"),
    "no model_type": (b"{}", "model_type None is not one of"),
    "infinity": (b'{"model_type": "gpt2", "layer_norm_epsilon": Infinity}', "layer_norm_epsilon = inf"),
    "1e400": (b'{"model_type": "gpt2", "layer_norm_epsilon": 1e400}', "layer_norm_epsilon = inf"),
    "no number": (b'{"model_type": "gpt2", "resid_pdrop": NaN}', "resid_pdrop = nan"),
    "10^7 layers": (b'{"model_type": "gpt2", "n_layer": 10000000}', "an integer of at most 10000"),
    "10^9 wide": (b'{"model_type": "gpt2", "n_embd": 1000000000}', "an integer of at most 16777216"),
    "a long string": (b'{"model_type": "gpt2", "n_layer": "' + b"9" * 10_000 + b'"}', "(10002 characters)"),
}


def one_line(error: TpError) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 4_000
    return text


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_that_cannot_be_a_models_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, said = CONTENTS[case]
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        read_config(tmp_path)
    assert said in one_line(caught.value)


def test_a_folder_a_pipe_and_a_gigabyte_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=f"^{tmp_path} has no config.json; give the folder of a Hugging Face"):
        read_config(tmp_path)
    path.mkdir()
    with pytest.raises(CheckpointError, match=f"^{path} is not a plain file"):
        read_config(tmp_path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a plain file"):
        read_config(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(CheckpointError, match=f"has 1073741824 bytes, more than the {MOST_BYTES}"):
        read_config(tmp_path)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        read_config(tmp_path)


def test_what_was_given_in_a_checkpoints_place_is_told(tmp_path: Path) -> None:
    for step in (500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
        os.utime(tmp_path / f"checkpoint-{step}" / "config.json", (step, step))
    with pytest.raises(CheckpointError, match="2 of the folders in it have one, checkpoint-1000 the newest"):
        read_config(tmp_path)
    file = tmp_path / "checkpoint-500" / "config.json"
    with pytest.raises(CheckpointError, match=f"^{file} is a file; give the folder it lies in, {file.parent}$"):
        read_config(file)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no config.json; it is an adapter: give it as --adapter"):
        read_config(tmp_path)


def test_a_key_said_twice_alike_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 3, "n_layer": 3}')
    assert read_config(tmp_path).n_layers == 3


NUMBERS = (True, -1, 0.5, 10**7, 10**400, 1e308, float("inf"), float("nan"))
VALUES: list[Any] = [None, *NUMBERS, "12", [], {}, {"a": 1}, [[]]]


@pytest.mark.parametrize("family", SMALL)
def test_every_key_with_every_odd_value_is_read_or_refused_in_one_line(family: str, tmp_path: Path) -> None:
    """With the checkpoint beside it, so that what is read must also be what the tensors are."""
    hf = {"model_type": family, **SMALL[family]}
    save(initialise(build(config_from_hf(hf))), tmp_path / "model")
    more = {"rope_parameters", "rope_scaling", "attn_config", "tie_word_embeddings", "initializer_range"}
    for key in sorted({*hf, *more}):
        for value in VALUES:
            (tmp_path / "model" / "config.json").write_text(json.dumps({**hf, key: value}))
            try:
                load(tmp_path / "model")
            except TpError as error:
                one_line(error)


@pytest.mark.parametrize("command", ["serve", "convert", "plan"])
def test_commands_end_with_status_2_and_the_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes(b'{"model_type": "gpt2", "n_layer": 10000000}')
    arguments = {"serve": ["--model", str(tmp_path)], "convert": [str(tmp_path), str(tmp_path / "out")]}
    arguments["plan"] = ["--model", str(tmp_path), "--gpus", "1", "--gpu-memory", "8GiB"]
    assert main([command, *arguments[command]]) == 2
    printed = capsys.readouterr().err.strip()
    assert "n_layer = 10000000 is not supported" in printed and "\n" not in printed
