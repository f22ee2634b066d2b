"""Writing checkpoints: transformers loads them bit for bit, at any tensor-parallel size, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from parallel.errors import CheckpointError
from parallel.ranks.group import Group
from tests.tp_decoders.checkpoint.test_load import MODELS, assert_same, full, write
from tp_decoders import build, initialise, load, save
from tp_decoders.checkpoint.load_save import full_tensor
from tp_decoders.checkpoint.slice_writer import SliceFiles, TensorPlan, divide
from tp_decoders.registry import FAMILIES, config_from_hf

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def load_and_save(group: Group, source: str, target: str, max_shard_size: int, dtype: torch.dtype | None) -> None:
    save(load(source, group=group, dtype=dtype), target, max_shard_size)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_transformers_loads_what_was_saved_bit_for_bit(
    family: str, size: int, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    tensors = write(tmp_path / "source", family)
    ranks(size, load_and_save, str(tmp_path / "source"), str(tmp_path / "target"), 10**9, None)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype="auto")
    assert type(saved) is type(MODELS[family]())
    assert saved.dtype == torch.float32
    assert_same({name: parameter.detach() for name, parameter in saved.named_parameters()}, tensors)
    assert_same(load_file(tmp_path / "target/model.safetensors"), tensors)
    assert json.loads((tmp_path / "source/config.json").read_text()) == json.loads(
        (tmp_path / "target/config.json").read_text()
    )


def test_bfloat16_and_several_files(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    tensors = write(tmp_path / "source", "gpt2")
    ranks(2, load_and_save, str(tmp_path / "source"), str(tmp_path / "target"), 5000, torch.bfloat16)
    files = sorted((tmp_path / "target").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    saved, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", dtype="auto", output_loading_info=True
    )
    assert saved.dtype == torch.bfloat16
    assert not any(report.values())
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert_same({name: parameter.detach() for name, parameter in saved.named_parameters()}, halved)
    assert_same(full(load(tmp_path / "target")), halved)


def test_files_are_filled_up_to_the_limit_and_hold_at_least_one_tensor() -> None:
    plans = [TensorPlan(str(i), (size,), torch.float32) for i, size in enumerate((10, 10, 5, 100, 1))]
    assert [[plan.name for plan in file] for file in divide(plans, 80)] == [["0", "1"], ["2"], ["3"], ["4"]]


def test_tokenizer_and_generation_defaults_come_along(tmp_path: Path) -> None:
    write(tmp_path / "source", "gpt2")
    for name in ("tokenizer.json", "generation_config.json", "merges.txt", "private-notes.txt"):
        (tmp_path / "source" / name).write_text(name)
    save(load(tmp_path / "source"), tmp_path / "target")
    found = {path.name for path in (tmp_path / "target").iterdir()}
    assert found == {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "merges.txt"}


def attempt(group: Group, source: str, target: str) -> str:
    """The error that this rank sees."""
    try:
        save(load(source, group=group), target)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_folder_that_holds_something_is_left_alone_and_every_rank_says_so(
    ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    write(tmp_path / "source", "gpt2")
    (tmp_path / "target").mkdir()
    assert ranks(2, attempt, str(tmp_path / "source"), str(tmp_path / "target")) == ["", ""], "an empty folder will do"
    before = {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()}
    for error in ranks(2, attempt, str(tmp_path / "source"), str(tmp_path / "target")):
        assert "is not an empty folder" in error
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()}


def test_a_disk_error_reaches_every_rank_and_leaves_nothing(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    write(tmp_path / "source", "gpt2")
    (tmp_path / "file").write_text("")
    for error in ranks(2, attempt, str(tmp_path / "source"), str(tmp_path / "file/target")):
        assert "cannot write a checkpoint" in error
    for error in ranks(2, full_disk, str(tmp_path / "source"), str(tmp_path / "target")):
        assert "No space left" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "source"]


def full_disk(group: Group, source: str, target: str) -> str:
    """As `attempt`, on a disk that fills up after the first tensors."""
    write_whole, left = SliceFiles.write_whole, [3]

    def failing(self: SliceFiles, name: str, tensor: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise CheckpointError(f"cannot write {name}: No space left on device")
        write_whole(self, name, tensor)

    SliceFiles.write_whole = failing  # type: ignore[method-assign]
    try:
        return attempt(group, source, target)
    finally:
        SliceFiles.write_whole = write_whole  # type: ignore[method-assign]


def fresh(group: Group, hf: dict[str, object], seed: int) -> dict[str, torch.Tensor | None]:
    model = initialise(build(config_from_hf(hf), group), seed)
    return {name: full_tensor(parameter, group) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_weights_are_the_same_at_every_size(family: str, ranks: Callable[..., list[Any]]) -> None:
    hf = {**MODELS[family]().config.to_dict(), "initializer_range": 0.05}
    one = ranks(1, fresh, hf, 7)[0]
    assert_same(ranks(3, fresh, hf, 7)[0], one)
    assert any(not torch.equal(tensor, one[name]) for name, tensor in ranks(1, fresh, hf, 8)[0].items())
    config = config_from_hf(hf)
    std_of = build(config, device="meta").init_std
    for name, tensor in one.items():
        if tensor.dim() == 2:
            assert abs(tensor.std().item() - std_of(config, name)) < 0.01, name
        else:
            assert (tensor == ("bias" not in name)).all(), name
