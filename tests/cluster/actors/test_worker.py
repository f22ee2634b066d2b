"""The worker shell, in a thread, without Ray."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cluster.actors.place import Place
from cluster.actors.worker import Worker
from parallel.errors import CheckpointError, WorkerError
from tests.cluster.actors.fake_program import MakeFake

PLACE = Place(rank=0, world=1, node="here")


def test_a_worker_starts_reports_runs_and_stops(tmp_path: Path) -> None:
    worker = Worker(0)
    thread = threading.Thread(target=worker.run, args=(PLACE, MakeFake(folder=str(tmp_path))), daemon=True)
    thread.start()
    ready = worker.ready()
    assert ready.facts["rank"] == 0
    assert list(ready.seconds) == ["reading weights"]
    assert thread.is_alive()
    worker.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert (tmp_path / "0").exists(), "the program was not closed"


def test_a_failed_start_is_raised_by_run_and_frees_those_who_wait(tmp_path: Path) -> None:
    worker = Worker(0)
    with pytest.raises(CheckpointError, match="no checkpoint at /nowhere"):
        worker.run(PLACE, MakeFake(fail="start", folder=str(tmp_path)))
    with pytest.raises(WorkerError, match="rank 0 did not start"):
        worker.ready()
    assert (tmp_path / "0").exists(), "the program was not closed"


def test_stop_before_the_start_has_ended_prevents_the_run() -> None:
    worker = Worker(0)
    thread = threading.Thread(target=worker.run, args=(PLACE, MakeFake(start_seconds=0.3)), daemon=True)
    thread.start()
    worker.stop()
    thread.join(5)
    assert not thread.is_alive()


def test_the_phase_under_way_is_named() -> None:
    worker = Worker(0)
    thread = threading.Thread(target=worker.run, args=(PLACE, MakeFake(start_seconds=0.3)), daemon=True)
    thread.start()
    while worker.phase().startswith("nothing"):
        pass
    assert worker.phase().startswith("reading weights, for 0.")
    worker.stop()
    thread.join(5)
