"""What is kept free for training beside a cache: never less than the optimiser and a real step take, nor far more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cluster.training.memory.lasting_memory import training_bytes
from cluster.training.memory.memory_reserve import pass_bytes, training_room
from cluster.training.step.nonfinite_errors import BrokenUpdate
from cluster.training.step.optimizer import OptimizerConfig, ShardedAdamW
from cluster.training.step.trainer import Trainer, TrainerConfig
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.training.step.steps import batch_of
from tp_decoders import build, initialise, load
from tp_decoders.registry import config_from_hf


@pytest.mark.parametrize(("dtype", "state", "read"), [(torch.float32, 12, 12), (torch.bfloat16, 16, 14)])
def test_room_is_state_and_a_pass_with_its_undoing_or_what_a_load_reads(
    tmp_path: Path, dtype: torch.dtype, state: int, read: int
) -> None:
    model = load(save_tiny("gpt2", tmp_path / "gpt2"), dtype=dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    bare, loading = (training_room(model, 64, "none", saves) for saves in (False, True))
    optimizer = ShardedAdamW(model, Group.single(), Group.single(), OptimizerConfig())
    flat = sum(flat.master.numel() for flat in optimizer.flats)
    held = flat * (4 + 4 + 8) - (4 * count if dtype is torch.float32 else 0)  # the master takes the parameter's place
    assert state * count <= held < 1.1 * state * count
    undone = 4 * flat + pass_bytes(model, 64, "none")
    assert read * count <= loading - bare + undone <= 1.1 * read * count, "a load needs no pass; the rest is padding"
    packed = bare - held - undone
    assert 0 <= packed < 4 * count * dtype.itemsize + (1 << 16), "weights packed for the backward, in whole pages"


def test_a_pass_needs_less_with_recomputation_and_more_with_more_tokens(tmp_path: Path) -> None:
    model = load(save_tiny("gpt_neox", tmp_path / "neox"))
    assert pass_bytes(model, 64, "full") < pass_bytes(model, 64, "none") < pass_bytes(model, 128, "none")


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "double-heads"])
def test_models_with_a_tasks_head_have_room_of_their_own(tmp_path: Path, task: str) -> None:
    model = load(save_tiny("gpt2", tmp_path / "gpt2"), task, labels=3)
    assert training_room(model, 64, "none", False) > 12 * sum(parameter.numel() for parameter in model.parameters())


def test_a_trial_of_an_update_fits_into_what_the_plan_keeps_for_it(tmp_path: Path) -> None:
    """The trial's copies, counted by the most that torch holds at once."""
    hf = {"model_type": "gpt2", "vocab_size": 9000, "n_positions": 64, "n_embd": 128, "n_layer": 1, "n_head": 2}
    config = config_from_hf({**hf, "bos_token_id": 0, "eos_token_id": 0})
    trainer = Trainer(initialise(build(config)), Groups(Group.single(), Group.single()), TrainerConfig())
    trainer.forward_backward(batch_of([torch.arange(16)], 15.0))
    optimizer = trainer.optimizer
    optimizer.prepare_state(0)
    planned = training_bytes(build(config, device="meta"), Group.single(), "cpu").update
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        with pytest.raises(BrokenUpdate):
            trainer.optim_step(learning_rate=1e39)
    held, peak = 0, 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 16 << 20 < peak <= planned, f"{peak / 2**20:.0f} of {planned / 2**20:.0f} MiB"


def test_a_rank_of_two_needs_its_own_part(tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    whole, half = (load(folder, group=Group(0, size)) for size in (1, 2))
    assert training_room(half, 64, "none", True) < 0.8 * training_room(whole, 64, "none", True)
