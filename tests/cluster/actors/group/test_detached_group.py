"""Ranks that outlive their owner, on a real Ray: taken over as they are, healed by the new owner, ended in order, and
ended by themselves where nobody comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from cluster.actors.group.detached_actors import DetachedOptions, DetachedRanks, end_leftovers
from cluster.actors.group.detached_group import DetachedGroup
from cluster.actors.group.worker import Lease, Worker
from parallel.errors import WorkerError
from tests.cluster.actors.group.lasting_program import MakeLasting
from tests.cluster.actors.group.test_worker_group import gone

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
ROOT = Path(__file__).resolve().parents[4]


@contextmanager
def owner(name: str, folder: Path, timeout_s: float) -> Iterator[tuple[DetachedRanks, list[int]]]:
    """A process that started a group, and is killed when the block begins."""
    address = ray.get_runtime_context().gcs_address
    command = [
        sys.executable,
        "-m",
        "tests.cluster.actors.group.detached_owner",
        address,
        name,
        str(folder),
        str(timeout_s),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        process.kill()
        process.wait(60)
        where = said["where"]
        yield (
            DetachedRanks(
                actors=tuple(where["actors"]), placement=where["placement"], bundles=tuple(where["bundles"]),
                life=where["life"],
            ),
            said["pids"],
        )  # fmt: skip
    finally:
        process.kill()
        process.wait(60)
        end_leftovers(name)


def kept(name: str, folder: Path, timeout_s: float = 300.0) -> DetachedGroup:
    return DetachedGroup(MakeLasting(str(folder)), 2, detached=DetachedOptions(name=name, orphan_timeout_s=timeout_s))


def within(seconds: float, condition: Callable[[], Any]) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
    return True


def room_of(name: str) -> list[str]:
    return [facts["state"] for facts in placement_group_table().values() if facts["name"] == name]


def test_ranks_outlive_their_owner_and_the_next_one_takes_them_over_heals_and_ends_them(tmp_path: Path) -> None:
    with owner("outlive", tmp_path, 300.0) as (where, pids):
        group = kept("outlive", tmp_path)
        ready = group.adopt(where)
        assert [r.pid for r in ready] == pids and group.wait_fault(1.0) is None
        assert group.whereabouts == where
        os.kill(pids[1], signal.SIGKILL)
        assert (fault := group.wait_fault(60.0)) is not None and "rank 1 on" in fault and "its process died" in fault
        healed = group.rebuild()
        assert healed[0].pid == pids[0] and healed[1].pid != pids[1], "the survivor went on"
        assert group.whereabouts.life == 1 and group.whereabouts.actors[0] == where.actors[0]
        group.close()
        assert all(gone(r.pid) for r in healed)
        assert within(60, lambda: set(room_of("outlive")) <= {"REMOVED"})


def test_an_owner_after_an_owner_takes_over(tmp_path: Path) -> None:
    with owner("again", tmp_path, 300.0) as (where, pids):
        first, second = kept("again", tmp_path), kept("again", tmp_path)
        first.adopt(where)
        first.give_up("as if it had died")  # a dead one watches no more
        assert [r.pid for r in second.adopt(where)] == pids
        assert second.wait_fault(1.5) is None, "the first one's watch ended, the second one's did not"
        second.close()


def test_orphans_end_by_themselves_and_give_their_room_back(tmp_path: Path) -> None:
    with owner("orphans", tmp_path, 2.0) as (where, pids):
        assert all(gone(pid) for pid in pids)
        assert within(60, lambda: set(room_of("orphans")) <= {"REMOVED"})
        with pytest.raises(WorkerError, match="the ranks that were left cannot be taken over"):
            kept("orphans", tmp_path).adopt(where)


def test_a_lease_that_is_renewed_does_not_run_out(tmp_path: Path) -> None:
    group = kept("renewed", tmp_path, timeout_s=5.0)
    pids = [ready.pid for ready in group.start()]
    try:
        assert group.wait_fault(8.0) is None
        assert not any(gone(pid, 0.0) for pid in pids)
    finally:
        group.close()


def test_a_start_ends_what_an_earlier_one_left(tmp_path: Path) -> None:
    (tmp_path / "earlier").mkdir()
    with owner("left", tmp_path / "earlier", 300.0) as (_, pids):
        group = kept("left", tmp_path)
        group.start()
        try:
            assert all(gone(pid) for pid in pids)
            assert room_of("left").count("CREATED") == 1
        finally:
            group.close()


def test_a_lease_counts_only_the_time_in_which_the_process_ran() -> None:
    ends: list[float] = []
    lease = Lease(0.4, lambda: ends.append(time.monotonic()))
    began = time.monotonic()
    lease.run_out()
    assert 0.4 <= time.monotonic() - began < 60
    Worker(0).renew()  # of no effect where there is no lease
