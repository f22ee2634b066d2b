"""Weight files as others write them: tied pairs under either name, wrappers' prefixes, buffers, mixed types; and files
that are damaged or made up, which are one line before memory is taken.
"""

from __future__ import annotations

import json
import logging
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from launch.main import main
from parallel.errors import CheckpointError
from tests.tp_decoders.checkpoint.test_load import assert_same, full, write
from tests.tp_decoders.model.test_config_hostile import POINTER
from tp_decoders import load
from tp_decoders.files.tensor_files import LAYOUTS
from tp_decoders.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

TIED = {"gpt2": ("transformer.wte.weight", "lm_head.weight"), "mpt": ("transformer.wte.weight", "lm_head.weight"),
        "gpt_bigcode": ("transformer.wte.weight", "lm_head.weight"),
        "gpt_neox_japanese": ("gpt_neox_japanese.embed_in.weight", "embed_out.weight")}  # fmt: skip


def set_config(folder: Path, **more: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def put(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("family", TIED)
def test_a_tied_pair_is_read_under_either_name_or_both(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = write(tmp_path, family)
    set_config(tmp_path, tie_word_embeddings=True)
    embedding, head = TIED[family]
    rest = {name: tensor for name, tensor in tensors.items() if name not in (embedding, head)}
    matrix = tensors[embedding]
    for pair in ({embedding: matrix}, {head: matrix}, {embedding: matrix, head: matrix.clone()}):
        put(tmp_path, rest | pair)
        assert_same(full(load(tmp_path)), rest | {embedding: matrix})
    assert "differ" not in caplog.text
    put(tmp_path, rest | {embedding: matrix, head: matrix + 1})
    assert_same(full(load(tmp_path)), rest | {embedding: matrix})
    assert caplog.text.count(f"{embedding} and {head} differ although") == 1
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 0
    assert caplog.text.count("differ although") == 2
    put(tmp_path, rest)
    with pytest.raises(CheckpointError, match=f"1 missing: {embedding}"):
        load(tmp_path)
    put(tmp_path, rest | {head: torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match=rf"{head} \[3, 3\] instead of"):
        load(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_a_trainers_prefix_is_read_over(prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = write(tmp_path, "gpt_neox")
    put(tmp_path, {prefix + name: tensor for name, tensor in tensors.items()})
    assert_same(full(load(tmp_path)), tensors)
    assert caplog.text == ""


def test_the_head_of_neox_is_read_by_its_new_name(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gpt_neox")
    put(tmp_path, {("lm_head.weight" if name == "embed_out.weight" else name): t for name, t in tensors.items()})
    assert_same(full(load(tmp_path)), tensors)


@pytest.mark.parametrize("buffer", [
    "h.0.attn.bias", "h.0.attn.masked_bias", "h.9.crossattention.bias", "rotary_emb.inv_freq",
    "layers.0.attention.rotary_emb.cos_cached", "alibi", "attn_bias", "bias",
])  # fmt: skip
def test_buffers_of_old_versions_are_passed_over_in_silence(
    buffer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = write(tmp_path, "gpt2")
    for prefix in ("", "transformer."):
        put(tmp_path, tensors | {prefix + buffer: torch.ones(2, 2, dtype=torch.bool)})
        assert_same(full(load(tmp_path)), tensors)
    assert caplog.text == ""


def test_tensors_that_nobody_asks_for_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = write(tmp_path, "gpt2")
    more = {f"v_head.summary.{i}.weight": torch.zeros(2) for i in range(30)} | {"a\nforged line": torch.zeros(2)}
    put(tmp_path, tensors | more)
    assert_same(full(load(tmp_path)), tensors)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "31 tensors are not used: 'a\\nforged line', v_head.summary.0.weight" in record.getMessage()
    assert "and 7 more" in record.getMessage()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_buffers_of_another_type_do_not_decide_the_weights(family: str, tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in write(tmp_path, family).items()}
    buffer = "h.0.attn.bias" if family == "gpt2" else "gpt_neox.layers.0.attention.rotary_emb.inv_freq"
    put(tmp_path, {"a.attn.masked_bias": torch.tensor(-1e9), buffer: torch.ones(999, 999), **tensors})
    assert {parameter.dtype for parameter in load(tmp_path).parameters()} == {torch.float16}
    assert_same(full(load(tmp_path)), tensors)


def test_weights_of_several_types_get_the_configs_or_the_commonest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in write(tmp_path, "gpt2").items()}
    norms = {name: tensor.float() for name, tensor in tensors.items() if ".ln_" in name}
    put(tmp_path, tensors | norms)
    with caplog.at_level(logging.INFO):
        for said, dtype in (
            (None, "bfloat16"),
            ("bfloat16", "bfloat16"),
            ("float32", "float32"),
            ("float16", "bfloat16"),
        ):
            set_config(tmp_path, dtype=said, torch_dtype=said)
            assert next(load(tmp_path).parameters()).dtype == getattr(torch, dtype)
            assert caplog.text.endswith(f"read as {dtype}\n")
    assert "weights of several types" in caplog.text and "MB of float32" in caplog.text


def edited(content: bytes, edit: Callable[[dict[str, Any]], object]) -> bytes:
    """The same bytes behind another header."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


WTE = "transformer.wte.weight"
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "overlapping": (lambda h: h[WTE].update(data_offsets=[0, 31 * 24 * 4]), f"model.safetensors cannot be read.*{WTE}"),
    "out of range": (lambda h: h[WTE].update(data_offsets=[8, 1 << 50]), f"model.safetensors cannot be read.*{WTE}"),
    "backwards": (lambda h: h[WTE].update(data_offsets=[2976, 0]), f"model.safetensors cannot be read.*{WTE}"),
    "negative": (lambda h: h[WTE].update(data_offsets=[-8, 2976]), "model.safetensors cannot be read"),
    "of huge shape": (lambda h: h[WTE].update(shape=[1 << 40, 1 << 40]), "model.safetensors cannot be read"),
    "of int8": (lambda h: h[WTE].update(dtype="I8", shape=[31, 96]), rf"{WTE} of I8 .*\(in model.safetensors\)"),
    "of float8": (lambda h: h[WTE].update(dtype="F8_E4M3", shape=[31, 96]), f"{WTE} of F8_E4M3 instead of float32"),
    "of bool": (lambda h: h[WTE].update(dtype="BOOL", shape=[31, 96]), f"{WTE} of BOOL"),
    "of int32": (lambda h: h[WTE].update(dtype="I32"), f"{WTE} of I32"),
    "of no type": (lambda h: h[WTE].update(dtype="Q4"), "model.safetensors cannot be read.*Q4"),
    "turned": (lambda h: h[WTE].update(shape=[24, 31]), rf"{WTE} \[24, 31\] instead of \[31, 24\]"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_made_up_header_is_one_line_that_names_file_and_tensor(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "gpt2")
    path = tmp_path / "model.safetensors"
    edit, message = HOSTILE[case]
    path.write_bytes(edited(path.read_bytes(), edit))
    made: list[object] = []
    monkeypatch.setattr("tp_decoders.checkpoint.load_save._fill_all", lambda *given: made.append(given))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and not made


@pytest.mark.parametrize("content", [
    struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", (1 << 64) - 1),
    struct.pack("<Q", 100_000) + b"[" * 100_000, b"",
])  # fmt: skip
def test_a_made_up_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    write(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read \(\d+ bytes\)"):
        load(tmp_path)


def test_a_file_without_tensors_names_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path, "gpt2")
    put(tmp_path, {})
    with pytest.raises(CheckpointError, match=r"28 missing: transformer.h.0.attn.* and 4 more"):
        load(tmp_path)


class Sparse:
    """Not a tensor."""


@pytest.mark.parametrize("value, message", [
    (torch.zeros(31, 24).to_sparse(), rf"bin does not hold a table of tensors \(plain ones; {WTE} are none"),
    (torch.zeros(31, 24, device="meta"), rf"bin does not hold a table of tensors \(plain ones; {WTE} are none"),
    (torch.zeros(31, 24, dtype=torch.float8_e4m3fn), rf"{WTE} of float8_e4m3fn .*\(in pytorch_model.bin\)"),
    (torch.zeros(31, 24, dtype=torch.complex64), f"{WTE} of complex64"),
    ([1, 2], rf"bin does not hold a table of tensors \(plain ones; {WTE} are none"),
    (Sparse(), "holds more than tensors.* nothing in it is run.*convert it to safetensors"),
])  # fmt: skip
def test_a_bin_file_holds_plain_tensors_or_is_refused(value: object, message: str, tmp_path: Path) -> None:
    tensors: dict[str, object] = dict(write(tmp_path, "gpt2"))
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors | {WTE: value}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_compressed_bin_file_is_refused_rather_than_misread(tmp_path: Path) -> None:
    tensors = write(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "stored")
    with zipfile.ZipFile(tmp_path / "stored") as stored:
        with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in stored.infolist():
                packed.writestr(entry.filename, stored.read(entry.filename))
    with pytest.raises(CheckpointError, match="pytorch_model.bin is compressed, .* as safetensors$"):
        load(tmp_path)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "module", "model"])
def test_a_trainers_state_dict_inside_a_bin_file_is_found(key: str, tmp_path: Path) -> None:
    tensors = write(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").unlink()
    torch.save({key: tensors, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "pytorch_model.bin")
    assert_same(full(load(tmp_path)), tensors)


@pytest.mark.parametrize(
    ("file", "do"),
    [
        ("adapter_config.json", "it is an adapter: give it as --adapter"),
        ("zero_to_fp32.py", "its weights are DeepSpeed's shards: `python zero_to_fp32.py"),
        ("flax_model.msgpack", "save it from transformers as safetensors"),
        ("model.fp16.safetensors", "$"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds_and_what_to_do(file: str, do: str, tmp_path: Path) -> None:
    write(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    with pytest.raises(CheckpointError, match=f"has none of model.safetensors, .*; it holds .*{file}.*{do}"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", ".", "", "sub/model.safetensors", 7])
def test_an_index_names_files_of_its_own_folder_only(name: object, tmp_path: Path) -> None:
    tensors = write(tmp_path / "a", "gpt2")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "a" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, name)})
    )
    with pytest.raises(CheckpointError, match="name of a file in the same folder|files that are not there"):
        load(tmp_path / "a")


@pytest.mark.parametrize("name", [*LAYOUTS, "tokenizer.json", "tokenizer_config.json", "merges.txt"])
def test_a_git_lfs_pointer_in_a_files_place_is_called_so(name: str, tmp_path: Path) -> None:
    write(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").unlink()
    for file in (name, "vocab.json", "merges.txt"):
        (tmp_path / file).write_bytes(POINTER if file == name else b"{}")
    read = load if name in LAYOUTS else load_tokenizer
    with pytest.raises(CheckpointError, match=f"^{tmp_path / name} is a Git LFS pointer in the file's place: run `git"):
        read(tmp_path)


def test_links_to_elsewhere_are_followed(tmp_path: Path) -> None:
    tensors = write(tmp_path / "a", "gpt2")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "blob")
    (tmp_path / "a" / "model.safetensors").symlink_to(tmp_path / "blob")
    assert_same(full(load(tmp_path / "a")), tensors)
