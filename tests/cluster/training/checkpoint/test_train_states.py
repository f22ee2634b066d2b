"""Saving and loading on several ranks: one rank's failure is everybody's at once, and takes nothing with it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from cluster.training.checkpoint.checkpointer import Checkpointer
from cluster.training.checkpoint.save_failure import UNKNOWN, FailureNotice
from cluster.training.service.train_coordinator import TrainCoordinator
from cluster.training.service.train_worker import SaveConfig, TrainWorker
from cluster.training.step.trainer import Trainer, TrainerConfig
from cluster.training.train_calls import InParts, Kind, Later, StateExists, TrainAnswer, TrainCall, TrainSequence
from parallel.errors import CheckpointError
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from tests.cluster.engine.tiny_models import save_tiny
from tp_decoders import load
from tp_decoders.checkpoint.slice_writer import SliceFiles

CONFIG = EngineConfig(kv_blocks=64, max_sequences=8)
DOCUMENTS = (TrainSequence(token_ids=(5, 9, 2, 7, 11, 3, 8)), TrainSequence(token_ids=(1, 4, 4, 6, 90)))
SOON_S = 90.0
"""Of a limit of 600: nobody waited for it."""


class Broken:
    """`with Broken(owner, "name"):` every call of that method fails, in this process."""

    def __init__(self, owner: Any, name: str, error: Exception) -> None:
        self.owner, self.name, self.error, self.whole = owner, name, error, getattr(owner, name)

    def __enter__(self) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise self.error

        setattr(self.owner, self.name, fail)

    def __exit__(self, *exc: object) -> None:
        setattr(self.owner, self.name, self.whole)


FULL = OSError(28, "No space left on device")


def save_with_a_bad_rank(group: Group, folder: str, root: str, bad: int, method: str) -> tuple[str, float]:
    """What a rank's save ended with, and after how many seconds."""
    groups = Groups(group, Group.single())
    trainer = Trainer(load(folder, group=group), groups, TrainerConfig())
    saver = Checkpointer(Path(root), groups)
    began = time.monotonic()
    try:
        if group.rank == bad:
            with Broken(SliceFiles, method, FULL):
                future = saver.save(trainer.model, trainer.optimizer, {}, name="state")
                future.exception(60)
        else:
            future = saver.save(trainer.model, trainer.optimizer, {}, name="state")
        future.result(60)
    except CheckpointError as error:
        return str(error), time.monotonic() - began
    return "saved", time.monotonic() - began


@pytest.mark.parametrize(
    ("bad", "method"), [(0, "lay_out"), (0, "write"), (0, "write_index"), (1, "write"), (1, "sync"), (1, "__init__")]
)
def test_a_save_that_fails_on_one_rank_fails_on_all_at_once_with_its_reason(
    ranks: Any, tmp_path: Path, bad: int, method: str
) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2")
    ends = ranks(2, save_with_a_bad_rank, str(folder), str(tmp_path / "root"), bad, method)
    for reason, seconds in ends:
        assert f"rank {bad}: " in reason and "No space left on device" in reason and seconds < SOON_S, ends
    assert not [path for path in (tmp_path / "root").iterdir() if path.is_dir()], "the draft is gone"


def test_a_failure_is_heard_through_the_store_where_the_folder_cannot_be_written(tmp_path: Path) -> None:
    store, folder = dist.HashStore(), tmp_path / "file"
    folder.write_text("no folder")
    board, other = (FailureNotice(folder, "state.1", store) for _ in range(2))
    assert board.heard() is None
    other.tell("rank 3: its disk is gone")
    assert board.heard() == "rank 3: its disk is gone"
    assert FailureNotice(folder, "state.2", store).heard() is None


def test_a_failure_is_heard_on_a_disk_too_full_for_its_words(tmp_path: Path) -> None:
    board = FailureNotice(tmp_path, "state.1", None)
    with Broken(Path, "write_text", FULL):
        board.tell("rank 3: no room")
    assert board.heard() == UNKNOWN and board.path.is_file()


def call(kind: Kind, **fields: Any) -> TrainCall:
    return TrainCall(kind=kind, **fields)


def step(number: int) -> TrainCall:
    return call(Kind.TRAIN_STEP, sequences=DOCUMENTS, expected_step=number, optimizer={"learning_rate": 1e-3})


def serve(group: Group, folder: str, root: str) -> Any:
    """Rank 0 drives; the second rank's disk fails where told to."""
    runner = build_runner(load(folder, group=group), CONFIG, 1 << 28)
    commands = Commands(group.comm, 30.0)
    side = TrainWorker(runner, Groups(group, Group.single()), saves=SaveConfig(root=Path(root)))
    if group.rank > 0:
        follow(runner, commands, {**side.handlers, "break": lambda broken: fail_here(group, broken)})
        return None
    engine = build_engine(runner, CONFIG, (), commands if group.size > 1 else None)
    lead = TrainCoordinator(side, commands, engine.weights_changed)
    try:
        return drive(lead, commands)
    finally:
        engine.close()


PATCHES: list[Broken] = []


def fail_here(group: Group, broken: bool) -> None:
    import cluster.training.checkpoint.restore

    if group.rank != 1:
        return
    if broken:
        PATCHES[:] = [
            Broken(SliceFiles, "write", FULL),
            Broken(cluster.training.checkpoint.restore, "read_local", FULL),
        ]
        for patch in PATCHES:
            patch.__enter__()
    else:
        while PATCHES:
            PATCHES.pop().__exit__()


def answered(outcome: TrainAnswer | Later | InParts) -> TrainAnswer:
    """As the engine's loop does it."""
    while not isinstance(outcome, TrainAnswer):
        if isinstance(outcome, Later):
            Future.exception(outcome.done, SOON_S)
            outcome = outcome.finish()
        else:
            outcome = outcome.advance() or outcome
    return outcome


def drive(lead: TrainCoordinator, commands: Commands) -> Any:
    """(log-probabilities of every step, refusals) of: steps, a failed save, a save, steps, a failed load, a load, the
    same steps.
    """
    refused = []

    def losses(first: int, count: int) -> list[Any]:
        return [answered(lead(step(number))).logprobs for number in range(first, first + count)]

    before = losses(0, 2)
    commands.issue("break", True)
    if commands.comm is not None:
        with pytest.raises(CheckpointError) as caught:
            answered(lead(call(Kind.SAVE, name="two")))
        refused.append(str(caught.value))
    commands.issue("break", False)
    assert answered(lead(call(Kind.SAVE, name="two"))).step == 2
    with pytest.raises(StateExists):
        lead(call(Kind.EXPORT, name="two"))
    after = losses(2, 3)
    commands.issue("break", True)
    if commands.comm is not None:
        with pytest.raises(CheckpointError) as caught:
            answered(lead(call(Kind.LOAD, name="two", expected_step=5)))
        refused.append(str(caught.value))
    commands.issue("break", False)
    more = losses(5, 1)  # as if the load had never been asked for
    assert answered(lead(call(Kind.LOAD, name="two", expected_step=6))).step == 2
    assert losses(2, 3) == after and losses(5, 1) == more
    return before + after + more, refused


@pytest.mark.parametrize(("family", "comm"), [("gpt2", "gloo"), ("gpt_bigcode", "shm")])
def test_ranks_save_and_load_alike_and_one_ranks_failure_leaves_all_as_they_were(
    ranks: Any, tmp_path: Path, family: str, comm: str
) -> None:
    folder = str(save_tiny(family, tmp_path / "model"))
    one, _ = serve(Group.single(), folder, str(tmp_path / "one"))
    three, refused = ranks(3, serve, folder, str(tmp_path / "three"), comm=comm)[0]
    assert three == one, "the same bits at another number of ranks"
    assert all("rank 1: " in reason and "No space left on device" in reason for reason in refused) and len(refused) == 2
