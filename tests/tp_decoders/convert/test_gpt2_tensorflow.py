"""A checkpoint that TensorFlow wrote: its logits, as TensorFlow computed them, and errors for every kind of damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.main import main
from parallel.attention.attend import Causal
from parallel.errors import CheckpointError
from tp_decoders import load
from tp_decoders.convert.crc32c import ONES, POLYNOMIAL, crc32c, masked_crc32c
from tp_decoders.convert.gpt2_tensorflow import Gpt2TensorFlowSource, hf_of_hparams, original_name
from tp_decoders.convert.tensorflow_files import TensorFlowFiles
from tp_decoders.registry import config_from_hf

DATA = Path(__file__).resolve().parents[2] / "data"
ORIGINAL = DATA / "gpt2-tensorflow"
WEIGHTS = "model.ckpt.data-00000-of-00001"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The checkpoint, to be damaged."""
    return Path(shutil.copytree(ORIGINAL, tmp_path / "gpt2", ignore=shutil.ignore_patterns("*.py")))


def convert(folder: Path, *options: str) -> int:
    return main(["convert", str(folder), str(folder.parent / "out"), "--from", "tensorflow", *options])


def test_the_logits_are_those_that_tensorflow_computed(copy: Path) -> None:
    expected = np.load(ORIGINAL / "expected.npz")
    tokens, logits = (torch.from_numpy(expected[name]) for name in ("tokens", "logits"))
    assert convert(copy) == 0
    theirs = AutoModelForCausalLM.from_pretrained(copy.parent / "out").eval()
    ours = load(copy.parent / "out")
    with torch.no_grad():
        assert torch.allclose(theirs(tokens[None]).logits[0], logits, atol=2e-5)
        assert torch.allclose(ours(tokens, torch.arange(len(tokens)), Causal((len(tokens),))), logits, atol=2e-5)
    assert theirs.config.n_head == 2 and theirs.config.eos_token_id is None, "the end of text is not in 64 words"


def test_the_vocabulary_comes_along_under_its_present_names(copy: Path) -> None:
    shutil.copyfile(DATA / "tokenizers" / "gpt2" / "vocab.json", copy / "encoder.json")
    shutil.copyfile(DATA / "tokenizers" / "gpt2" / "merges.txt", copy / "vocab.bpe")
    assert convert(copy, "--dtype", "bfloat16") == 0
    text = "Convert me, twice."
    ids = AutoTokenizer.from_pretrained(copy.parent / "out", use_fast=False)(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(DATA / "tokenizers" / "gpt2")(text)["input_ids"]
    assert load(copy.parent / "out").embed.weight.dtype is torch.bfloat16


def test_names_are_those_of_the_original_code() -> None:
    assert original_name("transformer.h.11.attn.c_proj.weight") == "model/h11/attn/c_proj/w"
    assert original_name("transformer.h.0.ln_2.weight") == "model/h0/ln_2/g"
    assert original_name("transformer.ln_f.bias") == "model/ln_f/b"
    assert original_name("transformer.wpe.weight") == "model/wpe"


def edit(path: Path, at: int, value: int | None = None) -> None:
    """Inverts a byte, or sets it."""
    content = bytearray(path.read_bytes())
    content[at] = content[at] ^ 255 if value is None else value
    path.write_bytes(content)


def compress(path: Path) -> None:
    """Says that the first block is compressed, with a checksum that agrees."""
    size = 850
    edit(path, size, 1)
    checksum = masked_crc32c(np.frombuffer(path.read_bytes()[: size + 1], np.uint8))
    for place, byte in enumerate(checksum.to_bytes(4, "little")):
        edit(path, size + 1 + place, byte)


def truncate(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def set_hparam(folder: Path, **values: int) -> None:
    path = folder / "hparams.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a weight": (lambda f: edit(f / WEIGHTS, 10_000), f"{WEIGHTS}: the checksum of model/"),
    "the data's end": (lambda f: truncate(f / WEIGHTS, 1), f"{WEIGHTS} has 32511 bytes and should have at least 32512"),
    "no data": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is not there"),
    "the index": (lambda f: edit(f / "model.ckpt.index", 40), "is not .*checksum of the block at byte 0 is wrong"),
    "a compressed index": (lambda f: compress(f / "model.ckpt.index"), "the block at byte 0 is compressed"),
    "the index's footer": (lambda f: edit(f / "model.ckpt.index", -1), "do not end with the table's magic number"),
    "the index's handles": (lambda f: edit(f / "model.ckpt.index", -45, 1), "is not the index .*checksum of the block"),
    "the index's end": (lambda f: truncate(f / "model.ckpt.index", 9), "do not end with the table's magic number"),
    "an empty index": (lambda f: (f / "model.ckpt.index").write_bytes(b""), "its 0 bytes do not end"),
    "no index": (lambda f: (f / "model.ckpt.index").unlink(), "model.ckpt.index cannot be read"),
    "no hparams": (lambda f: (f / "hparams.json").unlink(), "hparams.json cannot be read .*--config"),
    "hparams that are none": (lambda f: (f / "hparams.json").write_text("{}"), "gives no number for n_ctx, n_embd"),
    "more layers": (lambda f: set_hparam(f, n_layer=3), "missing: model/h2/attn/c_attn/b"),
    "fewer layers": (lambda f: set_hparam(f, n_layer=1), "unexpected: model/h1/attn/c_attn/b"),
    "another width": (lambda f: set_hparam(f, n_embd=32), r"model/wte is \[64, 16\] of float32, .* for \[64, 32\]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_an_error_that_names_the_file(kind: str, copy: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        source = Gpt2TensorFlowSource(copy, config_from_hf(hf_of_hparams(copy)))
        for name in source._shapes:
            source.read(name)


def test_a_failed_conversion_leaves_nothing_behind(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy / WEIGHTS, 20_000)
    assert convert(copy) == 2
    assert "its bytes are damaged" in capsys.readouterr().err
    assert [path.name for path in copy.parent.iterdir()] == ["gpt2"]


def test_two_checkpoints_in_a_folder_need_a_note_of_the_one(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "other.index").write_bytes(b"")
    assert convert(copy) == 0, "the file `checkpoint` names model.ckpt"
    (copy / "checkpoint").unlink()
    shutil.rmtree(copy.parent / "out")
    assert convert(copy) == 2
    assert "its .index files: model.ckpt.index, other.index" in capsys.readouterr().err


def test_what_tensorflow_writes_is_read_without_a_model() -> None:
    files = TensorFlowFiles(ORIGINAL / "model.ckpt")
    assert len(files.variables) == 28
    assert files.read("model/h1/mlp/c_proj/w").shape == (1, 64, 16)


def bit_by_bit(data: bytes) -> int:
    crc = ONES
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (POLYNOMIAL if crc & 1 else 0)
    return crc ^ ONES


@pytest.mark.parametrize("size", [0, 1, 3, 4, 255, 256, 257, 1000, 4099])
def test_checksums_equal_those_of_the_definition(size: int) -> None:
    data = np.random.RandomState(size).bytes(size)
    assert crc32c(np.frombuffer(data, np.uint8)) == bit_by_bit(data)
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283, "the published check value"


def test_checksums_go_on_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.RandomState(0).bytes(4099)
    monkeypatch.setattr("tp_decoders.convert.crc32c.BLOCK", 512)
    assert crc32c(np.frombuffer(data, np.uint8)) == bit_by_bit(data)
