"""Training checkpoints: transformers opens them, any layout resumes from them, exactly, and damage is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tests.cluster.engine.tiny_models as tiny
import tests.cluster.training.step.steps as steps
import tp_decoders
from cluster.training.checkpoint.checkpointer import (
    Checkpointer,
    latest_checkpoint,
    read_state,
    restore_optimizer,
    sound_checkpoint,
    verify,
)
from parallel.errors import CheckpointError
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups, init_groups
from tests.ranks import free_address


def _run(group: Group, folder: str, root: str, layout: Any, until: int, address: str, dtype: torch.dtype) -> str | None:
    """Trains to step `until` from the newest checkpoint under root, or from the start; saves there."""
    layout = steps.Layout(**layout)
    groups = Groups(group, Group.single())
    if layout.dp > 1:
        groups = init_groups(group.rank, group.size, layout.tp, layout.dp, address)
    newest = latest_checkpoint(Path(root))
    trainer = steps.make_trainer(layout, groups, str(newest or folder), dtype)
    if newest is not None:
        restore_optimizer(newest, trainer.model, trainer.optimizer, groups)
    for _ in steps.advance(trainer, groups, until - trainer.step):
        pass
    checkpointer = Checkpointer(Path(root), groups, keep=2)
    checkpointer.save(trainer.model, trainer.optimizer, {"seen": trainer.step})
    checkpointer.wait()
    return steps.digest(trainer, groups)  # type: ignore[no-any-return]


def _go(ranks: Any, folder: Path, root: Path, until: int, dtype: torch.dtype = torch.float32, **layout: int) -> str:
    size = layout.get("tp", 1) * layout.get("dp", 1)
    return ranks(size, _run, str(folder), str(root), layout, until, free_address(), dtype)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=["gpt2", "gpt_bigcode"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(request.param, tmp_path_factory.mktemp(request.param) / "start")  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 2, "dp": 2}])
def test_stop_and_resume_ends_with_the_undisturbed_bits(
    ranks: Any, checkpoint: Path, tmp_path: Path, layout: dict[str, int], dtype: torch.dtype
) -> None:
    whole = _go(ranks, checkpoint, tmp_path / "whole", 6, dtype, **layout)
    _go(ranks, checkpoint, tmp_path / "halves", 3, dtype, **layout)
    assert _go(ranks, checkpoint, tmp_path / "halves", 6, dtype, **layout) == whole


def test_another_number_of_tensor_parallel_ranks_continues_with_the_same_bits(
    ranks: Any, checkpoint: Path, tmp_path: Path
) -> None:
    whole = _go(ranks, checkpoint, tmp_path / "whole", 6, tp=2)
    for tp in (1, 3, 4):
        root = tmp_path / f"then-{tp}"
        _go(ranks, checkpoint, root, 3, tp=2)
        assert _go(ranks, checkpoint, root, 6, tp=tp) == whole, f"moments or masters were lost from tp 2 to {tp}"


def test_transformers_opens_a_checkpoint_in_the_middle_of_a_run(ranks: Any, checkpoint: Path, tmp_path: Path) -> None:
    _go(ranks, checkpoint, tmp_path, 2, tp=3)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and read_state(newest).extra == {"seen": 2}
    ours = tp_decoders.load(newest)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(newest).eval()
    ids = torch.arange(12) % steps.VOCAB
    with torch.no_grad():
        wanted = theirs(ids[None]).logits[0]
        from parallel.attention.forward_pass import Pass

        torch.testing.assert_close(ours(ids, Pass.packed([12])), wanted, rtol=1e-4, atol=1e-4)


def test_old_checkpoints_are_pruned_and_the_newest_is_found(ranks: Any, checkpoint: Path, tmp_path: Path) -> None:
    for until in (1, 2, 3):
        _go(ranks, checkpoint, tmp_path, until)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    (tmp_path / "latest").unlink()
    (tmp_path / ".step-00000009.part").mkdir()  # a save that was killed
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000003"


def test_damage_is_reported_by_file_name(ranks: Any, checkpoint: Path, tmp_path: Path) -> None:
    _go(ranks, checkpoint, tmp_path, 1)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    verify(newest)
    flip_last_bit(newest / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors differ from their checksums"):
        verify(newest)
    (newest / "training" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json is not the state of a complete training checkpoint"):
        read_state(newest)


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_the_damage_is_named(
    ranks: Any, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert sound_checkpoint(tmp_path) is None
    for until in (1, 2):
        _go(ranks, checkpoint, tmp_path, until)
    first, second = tmp_path / "step-00000001", tmp_path / "step-00000002"
    assert sound_checkpoint(tmp_path) == second
    flip_last_bit(second / "training" / "optimizer.safetensors")
    assert sound_checkpoint(tmp_path) == first == latest_checkpoint(tmp_path)
    assert "step-00000002: training/optimizer.safetensors differ" in caplog.text
    _go(ranks, checkpoint, tmp_path, 2)
    assert sound_checkpoint(tmp_path) == second, "the same steps were taken, and saved, again"
    for each in (first, second):
        flip_last_bit(each / "model.safetensors")
    with pytest.raises(CheckpointError, match="step-00000001: model.safetensors differ .* has no other"):
        sound_checkpoint(tmp_path)


def test_a_checkpoint_is_never_written_over(ranks: Any, checkpoint: Path, tmp_path: Path) -> None:
    _go(ranks, checkpoint, tmp_path, 1)
    with pytest.raises(CheckpointError, match="exists already"):
        _go(ranks, checkpoint, tmp_path, 1)
