"""Numbers that go wrong on one rank alone: the call fails on all of them, and every bit is as it was before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cluster.engine.engine_builder import build_runner
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from cluster.training.service.train_coordinator import TrainCoordinator
from cluster.training.service.train_worker import TrainWorker
from cluster.training.step.trainer import Trainer, TrainerConfig
from cluster.training.train_calls import Kind, NotApplied, TrainCall
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from parallel.sharding.rules import full_shape_of
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.training.service.test_failing_calls import CONFIG, answered, bits, call
from tp_decoders import load

LOST = 3.3e38
"""A float32 whose square is none."""
WRONG = (float("inf"), float("nan"), LOST)
BUFFERS = {"exp_avg": LOST, "master": 3.4e38}
"""What lies there before an update that then has no finite result."""
RATES = {"learning_rate": 1e3, "epsilon": 1e-20, "weight_decay": 10.0}


def element(trainer: Trainer, buffer: str) -> Tensor:
    """One number of a divided weight's gradient, moment or master on this rank."""
    flat = trainer.optimizer.flats[0]
    name = next(name for name, own in flat.parameters.items() if full_shape_of(own) != own.shape)
    place = flat.places[name][0] + 5
    whole = {"gradient": flat.grad, "master": flat.master, **trainer.optimizer._moments.get(flat, {})}[buffer]
    return whole[place : place + 1]


def one_rank(group: Group, folder: str, dtype: torch.dtype) -> Any:
    """What each call was answered, on rank 0, with a number of the last rank's spoilt; whether all was as before."""
    runner = build_runner(load(folder, group=group, dtype=dtype), CONFIG, 1 << 28)
    commands = Commands(group.comm, 30.0)
    side = TrainWorker(runner, Groups(group, Group.single()), TrainerConfig(micro_batch_tokens=6))
    lead = TrainCoordinator(side, commands, lambda: None) if group.rank == 0 else None
    spoils, found = group.rank == group.size - 1, []

    def together(work: Callable[[TrainCoordinator], Any]) -> Any:
        if lead is None:
            return follow(runner, commands, side.handlers)
        try:
            return work(lead)
        finally:
            commands.issue("stop")

    def refused(asked: TrainCall) -> None:
        def run(lead: TrainCoordinator) -> str:
            with pytest.raises(NotApplied) as error:
                answered(lead(asked))
            return str(error.value)

        before = bits(side)
        found.append((together(run), bits(side) == before))

    together(lambda lead: answered(lead(call(Kind.TRAIN_STEP, expected_step=0))))
    together(lambda lead: answered(lead(call(Kind.FORWARD_BACKWARD, idempotency_key="waits"))))
    assert side._trainer is not None
    trainer, step = side._trainer, Trainer.optim_step
    for wrong in WRONG:

        def overflown(self: Trainer, *arguments: Any, wrong: float = wrong, **named: Any) -> Any:
            if spoils:
                element(self, "gradient").fill_(wrong)
            return step(self, *arguments, **named)

        with mock.patch.object(Trainer, "optim_step", overflown):
            refused(call(Kind.TRAIN_STEP, idempotency_key=f"gradient {wrong}"))
    for buffer, wrong in BUFFERS.items():
        own = element(trainer, buffer)
        kept = own.clone()
        if spoils:
            own.fill_(wrong)
        trainer.optimizer._guard.forget()
        for kind in (Kind.OPTIM_STEP, Kind.TRAIN_STEP):
            refused(call(kind, idempotency_key=f"{kind.value} {buffer}", optimizer=RATES))
        own.copy_(kept)
    trainer.optimizer._guard.forget()
    together(lambda lead: answered(lead(call(Kind.OPTIM_STEP, idempotency_key="last"))))
    return found, trainer.step, side._waiting


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("gpt2", tmp_path_factory.mktemp("gpt2")))


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.float32), (3, torch.bfloat16)])
def test_a_call_whose_numbers_overflow_on_one_rank_is_refused_by_all_of_them(
    ranks: Any, folder: str, size: int, dtype: torch.dtype
) -> None:
    outcomes = ranks(size, one_rank, folder, dtype)
    words = [words for words, _ in outcomes[0][0]]
    assert all(unchanged for found, *_ in outcomes for _, unchanged in found)
    assert all("the gradient norm of step 1 is" in said for said in words[: len(WRONG)]), words
    assert all("the update would leave the" in said for said in words[len(WRONG) :]), words
    assert [(step, waiting) for _, step, waiting in outcomes] == [(2, 0)] * size
