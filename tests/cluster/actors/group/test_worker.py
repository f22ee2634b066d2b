"""The worker shell, in a thread, without Ray."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.actors.group.placement import Place
from cluster.actors.group.worker import MakeProgram, Phases, Worker, is_consequence, keep_nccl_here
from parallel.errors import CheckpointError, CollectiveError, WorkerError
from tests.cluster.actors.group.fake_program import FakeProgram, MakeFake

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
    thread.join(60)
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
    thread.join(60)
    assert not thread.is_alive()


def test_the_phase_under_way_is_named() -> None:
    worker = Worker(0)
    thread = threading.Thread(target=worker.run, args=(PLACE, MakeFake(start_seconds=2.0)), daemon=True)
    thread.start()
    while (phase := worker.phase()).startswith("nothing"):
        time.sleep(0.001)
    assert phase.startswith("reading weights, for ")
    worker.stop()
    thread.join(60)


class Remembering(FakeProgram):
    """Loses its peers in its first life, and remembers."""

    def __init__(self, place: Place, error: Exception) -> None:
        super().__init__(MakeFake(), place, Phases())
        self.error, self.lives = error, 1

    def run(self) -> None:
        if self.lives == 1:
            raise self.error
        super().run()

    def part(self, error: BaseException) -> bool:
        return is_consequence(error)

    def rejoin(self, make: MakeProgram, place: Place, phases: Phases) -> dict[str, int]:
        self.lives += 1
        self.thread = threading.get_ident()
        return {"lives": self.lives}


def test_a_program_that_only_lost_its_peers_lives_on_in_the_next_run() -> None:
    worker = Worker(0)
    made: list[Remembering] = []

    def make(place: Place, phases: Phases) -> Remembering:
        made.append(Remembering(place, CollectiveError("rank 1 died")))
        return made[-1]

    with pytest.raises(CollectiveError):
        worker.run(PLACE, make)
    assert worker.kept()
    thread = threading.Thread(target=worker.run, args=(replace(PLACE, life=1), make), daemon=True)
    thread.start()
    assert worker.ready(1).facts == {"lives": 2} and worker.ready(0).facts["rank"] == 0
    assert len(made) == 1 and not worker.kept()
    worker.stop(1)
    thread.join(60)
    assert not thread.is_alive()


def test_a_program_with_an_error_of_its_own_is_made_anew() -> None:
    worker = Worker(0)

    def make(place: Place, phases: Phases) -> Remembering:
        return Remembering(place, RuntimeError("out of memory"))

    for life in (0, 1):
        with pytest.raises(RuntimeError, match="out of memory"):
            worker.run(replace(PLACE, life=life), make)
        assert not worker.kept()


@pytest.mark.parametrize(
    ("host", "given", "then"),
    [("127.0.0.1", None, "=lo"), ("10.0.0.1", None, None), ("127.0.0.1", "eth1", "eth1")],
)
def test_nccl_listens_to_this_machine_alone_where_all_ranks_share_it(
    host: str, given: str | None, then: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", given or "")  # which monkeypatch puts back
    if given is None:
        del os.environ["NCCL_SOCKET_IFNAME"]
    keep_nccl_here(Place(rank=0, world=2, node="10.0.0.1", address=f"tcp://{host}:5000"))
    assert os.environ.get("NCCL_SOCKET_IFNAME") == then
