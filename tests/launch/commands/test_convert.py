"""`init` and `convert`: what they write is a checkpoint that transformers reads, with the values it had."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch.commands.convert import parse_size
from launch.main import main
from parallel.errors import ConfigError
from parallel.ranks.group import Group
from tp_decoders import load, save

ROOT = Path(__file__).resolve().parents[3]
SORTER = ROOT / "tests" / "data" / "gpt-nano-sort"
TOKENIZER = ROOT / "tests" / "data" / "tokenizers" / "gpt2"
SHAPE = """
model_type: gpt_neox
vocab_size: 50
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 4
intermediate_size: 64
"""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def test_a_checkpoint_survives_the_way_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["convert", str(SORTER), str(tmp_path / "half"), "--dtype", "bfloat16", "--max-shard-size", "100KB"]) == 0
    )
    assert "gpt2, bfloat16, 0.2 MB in 2 file(s)" in capsys.readouterr().out
    assert (tmp_path / "half" / "model.safetensors.index.json").is_file()
    assert main(["convert", str(tmp_path / "half"), str(tmp_path / "whole"), "--dtype", "float32"]) == 0
    before, after = weights(SORTER), weights(tmp_path / "whole")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.bfloat16().float(), after[name]), name


def resaved(group: Group, folder: str, out: str) -> None:
    save(load(folder, group=group), out)


def equals_its_slices(group: Group, folder: str, original: str) -> bool:
    ours, theirs = load(folder, group=group), load(original, group=group)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_what_three_ranks_wrote_is_read_by_two_and_four(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    ranks(3, resaved, str(SORTER), str(tmp_path / "three"))
    assert main(["convert", str(tmp_path / "three"), str(tmp_path / "again"), "--max-shard-size", "50KB"]) == 0
    for size in (2, 4):
        assert all(ranks(size, equals_its_slices, str(tmp_path / "again"), str(SORTER)))


def test_a_bin_file_becomes_safetensors(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((SORTER / "config.json").read_text())
    torch.save(weights(SORTER), old / "pytorch_model.bin")
    assert main(["convert", str(old), str(tmp_path / "new")]) == 0
    assert [path.name for path in (tmp_path / "new").glob("*.safetensors")] == ["model.safetensors"]
    assert all(torch.equal(tensor, weights(tmp_path / "new")[name]) for name, tensor in weights(SORTER).items())


def test_bin_files_with_an_index_and_names_without_a_prefix_are_read(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((SORTER / "config.json").read_text())
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights(SORTER).items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a buffer of old checkpoints
    halves = list(bare)[: len(bare) // 2], list(bare)[len(bare) // 2 :]
    for number, names in enumerate(halves, 1):
        torch.save({name: bare[name] for name in names}, old / f"pytorch_model-{number:05d}-of-00002.bin")
    table = {name: f"pytorch_model-{n:05d}-of-00002.bin" for n, names in enumerate(halves, 1) for name in names}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    assert main(["convert", str(old), str(tmp_path / "new"), "--tokenizer", str(TOKENIZER)]) == 0
    assert (tmp_path / "new" / "vocab.json").read_bytes() == (TOKENIZER / "vocab.json").read_bytes()
    found = weights(tmp_path / "new")
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights(SORTER).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "gpt2"], "--config is for --from deepspeed or tensorflow"),
        (["--tokenizer", "nowhere"], "nowhere holds none of"),
        (["--from", "deepspeed"], "holds no layer_XX-model_YY-model_states.pt"),
        (["--from", "tensorflow"], "hparams.json cannot be read"),
    ],
)
def test_what_the_input_is_not_is_said(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(SORTER), str(tmp_path / "new"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_random_weights_follow_the_seed(tmp_path: Path) -> None:
    shape = tmp_path / "shape.yaml"
    shape.write_text(SHAPE)
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["init", str(shape), str(tmp_path / name), "--seed", seed, "--tokenizer", str(TOKENIZER)]) == 0
    first, again, other = (weights(tmp_path / name)["gpt_neox.embed_in.weight"] for name in "abc")
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "gpt_neox"


def test_nothing_that_is_there_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["convert", str(SORTER), str(tmp_path)]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("text", "size"), [("500MB", 500_000_000), ("1.5gb", 1_500_000_000), ("7", 7), ("2 KB", 2000)])
def test_sizes_are_read_with_their_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5TB", "1e3", "5 GB x", "0.1B"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write a number and a unit"):
        parse_size(text)
