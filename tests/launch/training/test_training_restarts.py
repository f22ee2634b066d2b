"""How often a training job is started again: within limits after a fault, and not for a batch that comes again."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.actors.group.placement import PlacementConfig
from launch.training import run_training
from parallel.errors import WorkerError

POISON = "rank 0 on 10.0.0.7: step {}, batch 9 of the data (epoch 0, position 64): the loss is nan"
DIED = "rank 1 on 10.0.0.7: its process died (killed or crashed)"


class Stop(threading.Event):
    """Nobody waits in a test."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.append(timeout or 0.0)
        return False


def lives(monkeypatch: pytest.MonkeyPatch, faults: list[str | None], stop: Stop) -> int:
    """How many there were, each ended by a fault or (None) by the run's end."""
    begun: list[str | None] = []

    def one_life(*_: Any) -> Iterator[None]:
        begun.append(faults[len(begun)])
        yield
        if begun[-1] is not None:
            raise WorkerError(f"the run stopped: {begun[-1]}; the same command goes on from the last checkpoint")

    monkeypatch.setattr(run_training, "one_life", one_life)
    try:
        run_training.run_to_the_end(None, PlacementConfig(max_restarts=4), stop)  # type: ignore[arg-type]
    except WorkerError as error:
        assert str(begun[-1]) in str(error), "the cause is said"
    else:
        assert begun[-1] is None
    return len(begun)


def test_the_same_batch_twice_ends_the_run_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lives(monkeypatch, [POISON.format(5)] * 9, Stop()) == 2


def test_another_batch_is_another_fault_and_lost_processes_have_all_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stop()
    assert lives(monkeypatch, [DIED] * 9, stop) == 5 and stop.waited == [0.0, 1.0, 2.0, 4.0]
    assert lives(monkeypatch, [POISON.format(5), POISON.format(6), DIED, None], Stop()) == 4


@pytest.mark.parametrize("number", run_training.LASTING)
def test_a_disk_that_takes_nothing_more_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    fault = f"rank 0 on 10.0.0.7: the checkpoint of step 4 cannot be written: [Errno {number}] {os.strerror(number)}"
    assert lives(monkeypatch, [fault] * 9, Stop()) == 1
