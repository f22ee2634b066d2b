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
from parallel.attention.forward_pass import Pass
from parallel.errors import CheckpointError
from tp_decoders import load
from tp_decoders.convert.gpt2_tensorflow import Gpt2TensorFlowSource, hf_of_hparams, original_name
from tp_decoders.convert.tensorflow_files import FOOTER, MAGIC, TensorFlowFiles, masked_crc32c
from tp_decoders.convert.tensorflow_index_pb2 import Entry, Header, Shape
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
        assert torch.allclose(ours(tokens, Pass.packed((len(tokens),))), logits, atol=2e-5)
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
    checksum = masked_crc32c(path.read_bytes()[: size + 1])
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


def table_block(*entries: tuple[bytes, bytes], number: bytes = b"\0") -> bytes:
    """Of a table, with a checksum that agrees; `number` comes before each name's length: what it shares."""
    lengths = ((bytes([len(key)]), bytes([len(value)])) for key, value in entries)
    pairs = zip(lengths, entries, strict=True)
    body = b"".join(number + own + length + key + value for (own, length), (key, value) in pairs)
    content = body + bytes(4) + (1).to_bytes(4, "little") + b"\0"
    return content + masked_crc32c(content).to_bytes(4, "little")


def write_index(folder: Path, variable: bytes, header: bytes = b"", number: bytes = b"\0") -> Path:
    """An index of one variable, `model/x`, whatever is said of it, with 8 bytes of data."""
    data = table_block((b"", header), (b"model/x", variable), number=number)
    index = table_block((b"~", bytes([0, len(data) - 5])))
    handles = bytes([0, 0, len(data), len(index) - 5]).ljust(FOOTER - 8, b"\0")
    (folder / "it.index").write_bytes(data + index + handles + MAGIC.to_bytes(8, "little"))
    (folder / "it.data-00000-of-00001").write_bytes(bytes(range(8)))
    return folder / "it"


def entry(*sizes: int, dtype: int = 1, **values: int) -> bytes:
    shape = Shape(dim=[Shape.Dim(size=size) for size in sizes])
    message = Entry(dtype=dtype, shape=shape, size=8, crc32c=masked_crc32c(bytes(range(8))))
    for name, value in values.items():
        setattr(message, name, value)
    return message.SerializeToString()


def test_an_index_of_one_variable_is_read(tmp_path: Path) -> None:
    read = TensorFlowFiles(write_index(tmp_path, entry(1, 2))).read("model/x")
    assert read.shape == (1, 2) and read.view(torch.uint8).flatten().tolist() == list(range(8))


HOSTILE: dict[str, tuple[dict[str, bytes], str]] = {
    "a negative offset": ({"variable": entry(2, offset=-4)}, "model/x has a negative size"),
    "a negative length": ({"variable": entry(2, size=-8)}, "model/x has a negative size"),
    "negative sizes whose product is right": ({"variable": entry(-1, -2)}, "model/x has a negative size"),
    "a negative file": ({"variable": entry(2, shard_id=-1)}, "model/x has a negative size"),
    "a file that is not there": ({"variable": entry(2, shard_id=3)}, "data-00003-of-00001 is not there"),
    "an offset past the data": ({"variable": entry(2, offset=1 << 62)}, "should have at least"),
    "a length past the data": ({"variable": entry(2, size=1 << 40)}, "should have at least"),
    "a shape that does not fit": ({"variable": entry(1 << 40, 1 << 40)}, "which its shape .* does not"),
    "strings": ({"variable": entry(2, dtype=7)}, "is of data type 7"),
    "slices": ({"variable": entry(2) + bytes([7 << 3 | 2, 0])}, "partitioned into slices"),
    "big-endian numbers": ({"variable": entry(2), "header": Header(endianness=1).SerializeToString()}, "big-endian"),
    "a message cut short": ({"variable": entry(2)[:-1]}, "is not the index .*damaged"),
    "a group that never ends": ({"variable": bytes([8 << 3 | 3])}, "is not the index .*damaged"),
    "an entry past its block": ({"variable": entry(2), "number": b"\0\x7f\x7f"}, "an entry runs past its block"),
    "a number without an end": ({"variable": entry(2), "number": b"\xff" * 11}, "number at byte 0 has no end"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_index_with_right_checksums_and_wrong_contents_is_refused(kind: str, tmp_path: Path) -> None:
    contents, message = HOSTILE[kind]
    with pytest.raises(CheckpointError, match=message):
        TensorFlowFiles(write_index(tmp_path, **contents))


def bit_by_bit(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize("size", [0, 1, 3, 4, 255, 256, 257, 1000, 4099])
def test_checksums_equal_those_of_the_definition(size: int) -> None:
    data = np.random.RandomState(size).bytes(size)
    assert masked_crc32c(data) == masked_crc32c(np.frombuffer(data, np.uint8)) == bit_by_bit(data)
