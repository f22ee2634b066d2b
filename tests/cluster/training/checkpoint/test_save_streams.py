"""A save writes from the tensors themselves, in pieces: little memory, and the bits of the moment it was asked."""

from __future__ import annotations

import itertools
import mmap
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cluster.engine.run.command_stream import Commands
from cluster.training.checkpoint.checkpointer import Checkpointer
from cluster.training.service.train_coordinator import TrainCoordinator
from cluster.training.service.train_worker import SaveConfig, TrainWorker
from cluster.training.step.trainer import Trainer, TrainerConfig
from cluster.training.train_calls import InParts, Kind, Later, TrainAnswer, TrainCall
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.training.service.test_train_worker import DOCUMENTS, runner_of
from tests.cluster.training.step.steps import batch_of
from tp_decoders import build, initialise
from tp_decoders.checkpoint.slice_writer import SliceFiles, owned_pieces
from tp_decoders.files.tensor_files import open_checkpoint
from tp_decoders.registry import config_from_hf

SINGLE = Groups(Group.single(), Group.single())
MB = 1 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_save_takes_a_bounded_amount_of_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    hf = {"model_type": "gpt2", "vocab_size": 20000, "n_positions": 64, "n_embd": 512, "n_layer": 4, "n_head": 8}
    model = initialise(build(config_from_hf(hf), dtype=dtype))
    trainer = Trainer(model, SINGLE, TrainerConfig())
    trainer.forward_backward(batch_of([torch.arange(16)], 15.0))
    trainer.optim_step()
    state = sum(p.nbytes for p in model.parameters()) + sum(
        own.values.nbytes for own in trainer.optimizer.local_state()
    )
    before, stop = resident(), threading.Event()
    peak = [before]

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    Checkpointer(tmp_path, SINGLE).save(model, trainer.optimizer, {}).result(200)
    stop.set()
    watcher.join()
    assert state > 250 * MB and peak[0] - before < 100 * MB, f"{(peak[0] - before) / MB:.0f} of {state / MB:.0f} MB"


def slow(writes: list[int]) -> Any:
    """Files that take their time; `writes` counts what was written."""
    write = SliceFiles.write

    def late(self: SliceFiles, *arguments: Any) -> None:
        time.sleep(0.02)
        write(self, *arguments)
        writes.append(1)

    return mock.patch.object(SliceFiles, "write", late)


def ask(lead: TrainCoordinator, kind: Kind, **fields: Any) -> TrainAnswer | Later | InParts:
    return lead(TrainCall(kind=kind, sequences=DOCUMENTS if kind.takes_sequences else (), **fields))


def finished(outcome: TrainAnswer | Later | InParts) -> TrainAnswer:
    while not isinstance(outcome, TrainAnswer):
        if isinstance(outcome, Later):
            outcome.done.result(60)
            outcome = outcome.finish()
        else:
            outcome = outcome.advance() or outcome
    return outcome


def test_the_next_update_waits_for_a_save_and_nothing_else_does(tmp_path: Path) -> None:
    runner, writes = runner_of(str(save_tiny("gpt2", tmp_path / "gpt2"))), list[int]()
    side = TrainWorker(runner, SINGLE, saves=SaveConfig(root=tmp_path / "states"))
    (tmp_path / "states").mkdir()
    lead = TrainCoordinator(side, Commands(None), lambda: None)
    finished(ask(lead, Kind.TRAIN_STEP, expected_step=0))
    weights = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    with slow(writes):
        save = ask(lead, Kind.SAVE, name="one")
        added = ask(lead, Kind.FORWARD_BACKWARD, idempotency_key="a")
        assert isinstance(added, TrainAnswer) and isinstance(ask(lead, Kind.EVALUATE), TrainAnswer)
        held = ask(lead, Kind.OPTIM_STEP, idempotency_key="b")
        assert isinstance(held, InParts), "the save reads what it would change"
        assert all(torch.equal(weights[name], p) for name, p in runner.model.named_parameters())
        assert finished(held).step == 2 and writes, "it went on when all was read"
        assert finished(save).step == 1
    with open_checkpoint(tmp_path / "states" / "one") as checkpoint:
        stored = checkpoint.read("transformer.wte.weight", (slice(None), slice(None)))
        assert any(torch.equal(stored, weight) for weight in weights.values())
    after = [p.detach().clone() for p in runner.model.parameters()]
    finished(ask(lead, Kind.LOAD, name="one", idempotency_key="c"))
    assert all(torch.equal(weights[name], p) for name, p in runner.model.named_parameters())
    finished(ask(lead, Kind.FORWARD_BACKWARD, idempotency_key="a"))
    finished(ask(lead, Kind.OPTIM_STEP, idempotency_key="b"))
    assert all(torch.equal(a, p) for a, p in zip(after, runner.model.parameters(), strict=True)), (
        "moments were saved too"
    )


def test_a_held_update_can_be_given_up(tmp_path: Path) -> None:
    runner = runner_of(str(save_tiny("gpt2", tmp_path / "gpt2")))
    side = TrainWorker(runner, SINGLE, saves=SaveConfig(root=tmp_path))
    lead = TrainCoordinator(side, Commands(None), lambda: None)
    finished(ask(lead, Kind.FORWARD_BACKWARD, idempotency_key="a"))
    with slow([]):
        save = ask(lead, Kind.SAVE, name="one")
        held = ask(lead, Kind.OPTIM_STEP, idempotency_key="b")
        assert isinstance(held, InParts)
        held.cancel()
        assert side.state().waiting_calls == 1 and finished(save).step == 0
    assert finished(ask(lead, Kind.OPTIM_STEP, idempotency_key="b")).step == 1


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(11,), (4, 5), (1, 9), (9, 1)])
def test_elements_of_a_shard_written_by_several_replicas_make_the_whole(shape: tuple[int, ...], cut: int) -> None:
    parameter = torch.arange(float(torch.Size(shape).numel())).view(shape)
    borders = [round(parameter.numel() * i / cut) for i in range(cut + 1)]
    whole = torch.full(shape, -1.0)
    for low, high in itertools.pairwise(borders):
        for index, piece in owned_pieces(parameter, parameter.view(-1)[low:high], 0, (low, high)):
            whole[index] = piece
    assert torch.equal(whole, parameter)
