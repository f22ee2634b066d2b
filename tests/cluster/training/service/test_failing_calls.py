"""A training call that raises inside the ranks, wherever, fails alone: every bit is as it was before, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from cluster.training.checkpoint import restore
from cluster.training.service import train_worker
from cluster.training.service.train_coordinator import TrainCoordinator
from cluster.training.service.train_worker import SaveConfig, TrainWorker
from cluster.training.step import gradient_accumulation, trainer
from cluster.training.step import optimizer as optimizer_module
from cluster.training.step.trainer import TrainerConfig
from cluster.training.train_calls import (
    InParts,
    Kind,
    Later,
    NotApplied,
    TrainAnswer,
    TrainCall,
    TrainingFailed,
    TrainSequence,
)
from parallel.errors import CheckpointError, CollectiveError, TpError
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from tests.cluster.engine.tiny_models import save_tiny
from tp_decoders import load

DOCUMENTS = tuple(TrainSequence(token_ids=ids) for ids in ((5, 9, 2, 7), (1, 4, 4, 6, 90), (13, 2, 8), (3, 1, 2, 2)))
CONFIG = EngineConfig(kv_blocks=64, max_sequences=8)
BIT = tuple[Any, ...]


def call(kind: Kind, **fields: Any) -> TrainCall:
    given: dict[str, Any] = {"kind": kind, "sequences": DOCUMENTS if kind.takes_sequences else ()}
    return TrainCall(**{**given, **fields})


def answered(outcome: TrainAnswer | Later | InParts) -> TrainAnswer:
    """As the engine's loop does it, without steps in between."""
    while not isinstance(outcome, TrainAnswer):
        if isinstance(outcome, Later):
            outcome.done.exception(60)
            outcome = outcome.finish()
        else:
            outcome = outcome.advance() or outcome
    return outcome


def bits(side: TrainWorker) -> BIT:
    """All that a call may change on a rank."""
    assert side._trainer is not None
    optimizer = side._trainer.optimizer
    kept = [p.detach() for p in side._runner.model.parameters()]
    kept += [flat.master for flat in optimizer.flats]
    kept += [moment for moments in optimizer._moments.values() for moment in moments.values()]
    kept += [flat.view(flat.grad, name) for flat in optimizer.flats for name in sorted(flat.waiting)]
    whole = tuple(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in kept)
    return whole, side._waiting, optimizer.steps, side._runner.weight_version, torch.get_rng_state().numpy().tobytes()


def failing(after: int, error: type[Exception], whole: Callable[..., Any]) -> Callable[..., Any]:
    """Calls the original that often, then raises."""
    left = [after]

    def run(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error("told to fail")
        return whole(*arguments, **named)

    return run


FAULTS: dict[str, tuple[Any, str, int, type[Exception]]] = {
    "forward": (trainer, "vocab_token_losses", 0, RuntimeError),
    "forward of the third micro-batch": (trainer, "vocab_token_losses", 2, MemoryError),
    "loss of the second micro-batch": (trainer, "compute_loss", 1, OverflowError),
    "backward": (torch.Tensor, "backward", 0, RuntimeError),
    "backward of the second micro-batch": (torch.Tensor, "backward", 1, IndexError),
    "gradients of the second micro-batch": (gradient_accumulation, "outer_product", 12, ValueError),
    "batch": (train_worker, "batch_of", 0, KeyError),
    "answer": (train_worker, "by_sequence", 0, ZeroDivisionError),
    "norm": (optimizer_module, "squared_norm", 0, OverflowError),
    "update": (optimizer_module, "_update_one", 0, MemoryError),
}
KINDS = {
    Kind.TRAIN_STEP: set(FAULTS),
    Kind.FORWARD_BACKWARD: set(FAULTS) - {"norm", "update"},
    Kind.OPTIM_STEP: {"norm", "update"},
    Kind.EVALUATE: {"forward", "forward of the third micro-batch", "loss of the second micro-batch", "batch", "answer"},
}


def every_fault(group: Group, folder: str, root: str, waits: bool) -> Any:
    """One rank: each fault in each kind of call, on all ranks alike; rank 0 says what was raised."""
    runner = build_runner(load(folder, group=group), CONFIG, 1 << 28)
    commands = Commands(group.comm, 30.0)
    config = TrainerConfig(micro_batch_tokens=6)
    side = TrainWorker(runner, Groups(group, Group.single()), config, SaveConfig(root=Path(root)))
    engine = build_engine(runner, CONFIG, (), commands if group.size > 1 else None) if group.rank == 0 else None
    lead = TrainCoordinator(side, commands, lambda: None) if engine else None
    found, key = [], 0

    def together(work: Callable[[TrainCoordinator], Any]) -> Any:
        """On rank 0; the others follow until it stops them."""
        if lead is None:
            return follow(runner, commands, side.handlers)
        try:
            return work(lead)
        finally:
            if group.size > 1:
                commands.issue("stop")

    def prepare(lead: TrainCoordinator) -> None:
        answered(lead(call(Kind.TRAIN_STEP, expected_step=0)))
        answered(lead(call(Kind.SAVE, name="one")))
        if waits:
            answered(lead(call(Kind.FORWARD_BACKWARD, idempotency_key="first")))

    def refused(asked: TrainCall) -> Callable[[TrainCoordinator], str]:
        def run(lead: TrainCoordinator) -> str:
            with pytest.raises((TrainingFailed, CheckpointError, NotApplied)) as error:
                answered(lead(asked))
            assert not isinstance(error.value, CollectiveError)
            return str(error.value)

        return run

    together(prepare)
    before = bits(side)
    for kind, names in KINDS.items():
        for name in sorted(names):
            if kind is Kind.OPTIM_STEP and not waits:
                continue
            key += 1
            owner, attribute, after, error = FAULTS[name]
            asked = call(kind, idempotency_key=f"k{key}")
            with mock.patch.object(owner, attribute, failing(after, error, getattr(owner, attribute))):
                found.append((kind.value, name, together(refused(asked))))
            assert bits(side) == before, (kind, name)
    for name, attribute in (("read", "read"), ("check", "check_moments")):
        asked = call(Kind.LOAD, name="one", idempotency_key=f"l{name}")
        with mock.patch.object(restore, attribute, failing(0, OSError, getattr(restore, attribute))):
            found.append(("LoadState", name, together(refused(asked))))
        assert bits(side) == before
    with mock.patch.object(train_worker.Checkpointer, "save", failing(0, OSError, train_worker.Checkpointer.save)):
        found.append(("SaveState", "save", together(refused(call(Kind.SAVE, name="two")))))
    assert bits(side) == before
    last = together(lambda lead: answered(lead(call(Kind.TRAIN_STEP, idempotency_key="last"))))
    return found, last and (last.loss, last.grad_norm, last.logprobs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("gpt_neox", tmp_path_factory.mktemp("neox")))


@pytest.mark.parametrize("waits", [False, True], ids=["nothing waits", "gradients wait"])
def test_a_fault_in_any_part_of_any_call_fails_that_call_alone_on_one_rank_and_on_two(
    ranks: Any, folder: str, tmp_path: Path, waits: bool
) -> None:
    one, last = every_fault(Group.single(), folder, str(tmp_path / "one"), waits)
    (tmp_path / "two").mkdir()
    two, same = ranks(2, every_fault, folder, str(tmp_path / "two"), waits)[0]
    assert [entry[:2] for entry in one] == [entry[:2] for entry in two] and last == same
    assert all("told to fail" in words for *_, words in [*one, *two]), [w for *_, w in one if "told" not in w]


def asymmetric(group: Group, folder: str, name: str, rank: int) -> Any:
    """A fault after a rank's last collective, on that rank alone."""
    runner = build_runner(load(folder, group=group), CONFIG, 1 << 28)
    commands = Commands(group.comm, 30.0)
    side = TrainWorker(runner, Groups(group, Group.single()), TrainerConfig(micro_batch_tokens=6))
    owner, attribute, after, error = FAULTS[name]
    broken = failing(after, error, getattr(owner, attribute)) if group.rank == rank else getattr(owner, attribute)
    with mock.patch.object(owner, attribute, broken):
        if group.rank > 0:
            follow(runner, commands, side.handlers)
        else:
            lead = TrainCoordinator(side, commands, lambda: None)
            with pytest.raises(TrainingFailed, match=f"rank {rank}: .*told to fail"):
                answered(lead(call(Kind.FORWARD_BACKWARD, idempotency_key="a")))
            assert lead(call(Kind.STATE)).waiting_calls == 0  # type: ignore[union-attr]
            commands.issue("stop")
    return side._waiting, [sorted(flat.waiting) for flat in side._trainer.optimizer.flats] if side._trainer else None


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_one_rank_after_its_last_collective_is_agreed_upon(ranks: Any, folder: str, rank: int) -> None:
    assert ranks(2, asymmetric, folder, "answer", rank) == [(0, [[], []])] * 2


def test_an_error_on_rank_0_alone_is_the_calls_own(folder: str) -> None:
    runner = build_runner(load(folder), CONFIG, 1 << 28)
    lead = TrainCoordinator(TrainWorker(runner, Groups(Group.single(), Group.single())), Commands(None), lambda: None)
    with mock.patch.object(TrainCoordinator, "_check_step", failing(0, OSError, TrainCoordinator._check_step)):
        with pytest.raises(TpError, match="failed on rank 0: OSError"):
            lead(call(Kind.TRAIN_STEP, expected_step=0))
    assert answered(lead(call(Kind.TRAIN_STEP, expected_step=0))).step == 1
