"""What is kept free for training: exact where it is bytes per parameter, and never less than the optimiser takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.training.optimizer import OptimizerConfig, ShardedAdamW
from cluster.training.room import pass_bytes, training_room
from parallel.group import Group
from tests.cluster.engine.tiny_models import save_tiny
from tp_decoders import load


@pytest.mark.parametrize(("dtype", "state", "copies"), [(torch.float32, 12, 12), (torch.bfloat16, 16, 14)])
def test_room_is_state_copies_of_a_save_and_a_pass(tmp_path: Path, dtype: torch.dtype, state: int, copies: int) -> None:
    model = load(save_tiny("gpt2", tmp_path / "gpt2"), dtype=dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    bare, saving = (training_room(model, 64, "none", saves) for saves in (False, True))
    assert saving - bare == copies * count
    largest = max(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    assert bare == state * count + largest + pass_bytes(model, 64, "none")
    optimizer = ShardedAdamW(model, Group.single(), Group.single(), OptimizerConfig())
    flat = sum(flat.master.numel() for flat in optimizer.flats)
    held = flat * (4 + 4 + 8) - (4 * count if dtype is torch.float32 else 0)  # the master takes the parameter's place
    assert state * count <= held < 1.1 * state * count, "what the optimiser holds; the rest is padding"


def test_a_pass_needs_less_with_recomputation_and_more_with_more_tokens(tmp_path: Path) -> None:
    model = load(save_tiny("gpt_neox", tmp_path / "neox"))
    assert pass_bytes(model, 64, "full") < pass_bytes(model, 64, "none") < pass_bytes(model, 128, "none")
