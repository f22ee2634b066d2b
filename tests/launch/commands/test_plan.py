"""`tp-decoders plan`: answers in words, a preset that `train` or `serve` takes, and no where there is no room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.commands.plan import parse_memory
from launch.main import main
from launch.presets import CONFIGS, Layer, build, read
from launch.serving.serve_config import ServeConfig
from launch.training.train_config import TrainConfig
from parallel.errors import ConfigError

SMALL = ["--sequence", "128", "--batch-size", "8"]


def plan(*arguments: str) -> int:
    return main(["plan", *arguments])


def shown_preset(text: str) -> dict[str, Any]:
    """The YAML at the end of what was printed."""
    preset: dict[str, Any] = yaml.safe_load(text[text.rindex("\n# ") :])
    return preset


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_printed_preset_is_one_that_train_takes(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model", "gpt2", "--gpus", "2", "--gpu-memory", "80GiB", "--mode", mode, *SMALL) == 0
    said = capsys.readouterr().out
    assert "gpt2, 0.12 B parameters" in said and "nothing is computed twice" in said
    given = Layer("test", {"out": "run", "corpus": {"path": "text.txt"}})
    config = build(TrainConfig, [Layer("printed", shown_preset(said)), given])
    assert config.parallel.tp * config.parallel.dp == 2 and config.parallel.device == "cuda"
    assert (config.lora is not None) == (mode == "lora")


def test_the_printed_preset_is_one_that_serve_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model", "santacoder", "--gpus", "4", "--gpu-memory", "24GB", "--mode", "serve") == 0
    config = build(
        ServeConfig, [Layer("printed", shown_preset(capsys.readouterr().out)), Layer("test", {"model": "m"})]
    )
    assert config.engine.kv_blocks == 16 * 2048 // 16


def test_a_preset_is_written_to_a_new_file_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.yaml"
    arguments = ["--model", "tiny-gpt2", "--gpus", "2", "--gpu-memory", "2GiB", "--device", "cpu", "--out", str(out)]
    assert plan(*arguments) == 0
    assert read(out).values["parallel"]["device"] == "cpu"
    capsys.readouterr()
    assert plan(*arguments) == 2
    assert "name a new file" in capsys.readouterr().err


def test_a_folder_with_a_config_is_planned_and_named_in_the_preset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = dict(read(CONFIGS / "models" / "tiny-gpt-neox.yaml").values)
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    assert plan("--model", str(tmp_path), "--gpus", "1", "--gpu-memory", "16GiB", "--sequence", "64") == 0
    assert shown_preset(capsys.readouterr().out)["model"] == str(tmp_path)


def test_where_nothing_fits_it_says_no_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model", "gpt2-medium", "--gpus", "1", "--gpu-memory", "7GiB", "--sequence", "512") == 1
    said = capsys.readouterr().out
    assert "no layout fits: the smallest, tp=1 x dp=1, recompute " in said
    assert "nearest that would fit: 2 such ranks, tp=2 x dp=1" in said
    assert "parallel:" not in said, "no preset of what does not fit"


def test_the_20b_model_on_two_nodes_of_eight_stays_within_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model", "gpt-neox-20b", "--gpus", "16", "--gpu-memory", "80GiB") == 0
    best = capsys.readouterr().out.split("why\n")[1].splitlines()[0]
    assert "tp=4 x dp=4" in best and "tp=4 stays within a node" in best


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt3", "--gpus", "1", "--gpu-memory", "8GB"], "no preset 'gpt3' in configs/models"),
        (["--model", "gpt2", "--gpus", "1", "--gpu-memory", "much"], "--gpu-memory is 'much'; write a number"),
        (["--model", "gpt2", "--gpus", "0", "--gpu-memory", "8GB"], "--gpus is 0; give at least 1"),
        (["--model", "gpt2", "--gpus", "1", "--gpu-memory", "8GB", "--micro-batch-tokens", "9"], "are never cut"),
        (["--model", "gpt2", "--gpus", "1", "--gpu-memory", "8GB", "--sequence", "2048"], "model with 1024 positions"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("80G", 80 * 2**30), ("80 GB", 80 * 10**9), ("1.5TiB", 3 * 2**39)]
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "80", "-3GB", "80 bananas", "0GB"])
def test_a_size_without_sense_is_refused(text: str) -> None:
    if text == "80":
        assert parse_memory(text) == 80
    else:
        with pytest.raises(ConfigError, match="--gpu-memory is"):
            parse_memory(text)
