"""Worker groups on a real local Ray: they start, say why they cannot, notice a dead rank and leave nothing behind."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from pathlib import Path

import pytest

from cluster.actors.group.placement import PlacementConfig
from cluster.actors.group.worker import Ready
from cluster.actors.group.worker_group import WorkerGroup
from parallel.errors import CheckpointError, ConfigError, WorkerError
from tests.cluster.actors.group.fake_program import MakeFake

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def gone(pid: int, within: float = 60.0) -> bool:
    """Whether a process ends within the time; a zombie has ended."""
    limit = time.monotonic() + within
    while time.monotonic() < limit:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_two_ranks_start_report_and_stop_when_asked(tmp_path: Path) -> None:
    group = WorkerGroup(MakeFake(folder=str(tmp_path)), size=2, config=PlacementConfig(stop_timeout_s=60.0))
    ready = group.start()
    assert [(r.facts["rank"], r.place.local_rank, r.place.local_size) for r in ready] == [(0, 0, 2), (1, 1, 2)]
    assert ready[0].place.address is not None and ready[0].place.address == ready[1].place.address
    assert ready[0].pid != ready[1].pid
    assert {"placing", "starting processes", "reading weights"} <= set(ready[1].seconds)
    assert group.wait_fault(0.0) is None
    group.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"], "a rank was killed, not stopped"
    assert all(gone(r.pid) for r in ready)
    group.close()


def test_more_ranks_than_cores_is_refused_with_the_numbers() -> None:
    rule = "16 ranks need 16 CPU cores on one node, the cluster has 3; set parallel.tp to at most 3"
    with pytest.raises(ConfigError, match=rule):
        WorkerGroup(MakeFake(), size=16).start()


def test_a_failed_start_names_rank_node_and_cause_and_keeps_its_kind(tmp_path: Path) -> None:
    group = WorkerGroup(MakeFake(fail="start", on_rank=1, folder=str(tmp_path)), size=2)
    with pytest.raises(CheckpointError, match=r"rank 1 on [\d.]+ did not start: no checkpoint at /nowhere"):
        group.start()
    assert all(gone(int(path.read_text())) for path in tmp_path.iterdir())


class Impatient(WorkerGroup):
    """Gives processes their time to come, and little to be ready."""

    def _await_ready(self) -> list[Ready]:
        self.config = PlacementConfig(start_timeout_s=5.0)
        return super()._await_ready()


def test_a_start_that_takes_too_long_names_the_ranks_and_their_phase() -> None:
    group = Impatient(MakeFake(start_seconds=300), size=2)
    with pytest.raises(WorkerError, match=r"not ready within 5 s: rank 0 .*in reading weights, for .*; rank 1 "):
        group.start()


def test_a_busy_cluster_is_told_from_one_that_is_too_small() -> None:
    first = WorkerGroup(MakeFake(), size=2)
    first.start()
    try:
        with pytest.raises(WorkerError, match=r"2 ranks were not placed within 2 s: .* busy .1 CPU cores"):
            WorkerGroup(MakeFake(), size=2, config=PlacementConfig(place_timeout_s=2.0)).start()
    finally:
        first.close()


def test_a_killed_rank_is_reported_by_name() -> None:
    faults: queue.Queue[str] = queue.Queue()
    group = WorkerGroup(MakeFake(), size=2)
    ready = group.start(faults.put)
    os.kill(ready[1].pid, signal.SIGKILL)
    message = faults.get(timeout=60)
    assert message.startswith(f"rank 1 on {ready[1].place.node}: its process died (killed or crashed)")
    assert group.wait_fault(0.0) == message
    group.close()
    assert gone(ready[0].pid)


def test_the_rank_that_failed_is_named_not_those_that_waited_for_it(tmp_path: Path) -> None:
    faults: queue.Queue[str] = queue.Queue()
    group = WorkerGroup(MakeFake(fail="run", on_rank=1, meet=str(tmp_path)), size=2)
    group.start(faults.put)
    assert faults.get(timeout=60).endswith(": RuntimeError: the reason")
    group.close()


def test_a_program_that_ends_unasked_is_a_fault() -> None:
    faults: queue.Queue[str] = queue.Queue()
    group = WorkerGroup(MakeFake(fail="return"), size=1)
    group.start(faults.put)
    assert "rank 0 on " in faults.get(timeout=60)
    group.close()


def test_a_rank_that_does_not_hear_of_the_end_is_not_waited_for() -> None:
    group = WorkerGroup(MakeFake(), size=2, config=PlacementConfig(stop_timeout_s=600.0, silence_s=600.0))
    ready = group.start()
    os.kill(ready[1].pid, signal.SIGSTOP)
    closing = threading.Thread(target=group.close, daemon=True)
    closing.start()
    closing.join(100)
    assert not closing.is_alive() and all(gone(r.pid) for r in ready)
