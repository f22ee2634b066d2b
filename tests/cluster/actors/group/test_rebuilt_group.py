"""Groups that are rebuilt after a fault, on a real local Ray: who stays, who comes anew, and what is waited for."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.actors.group.placement import PlacementConfig
from cluster.actors.group.worker import Ready
from cluster.actors.group.worker_group import WorkerGroup
from parallel.errors import CheckpointError, ConfigError, WorkerError
from tests.cluster.actors.conftest import await_free_cores
from tests.cluster.actors.group.lasting_program import MakeLasting
from tests.cluster.actors.group.test_worker_group import gone

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
QUICK = PlacementConfig(silence_s=5.0, place_timeout_s=5.0, start_timeout_s=200.0)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., tuple[WorkerGroup, list[Ready]]]]:
    """Starts groups of two lasting programs, and closes them."""
    groups: list[WorkerGroup] = []

    def start(**plan: object) -> tuple[WorkerGroup, list[Ready]]:
        group = WorkerGroup(MakeLasting(str(tmp_path), **plan), 2, config=QUICK)  # type: ignore[arg-type]
        groups.append(group)
        return group, group.start()

    yield start
    for group in groups:
        group.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_comes_anew_and_its_peer_goes_on_in_its_process(started: Callable, rank: int) -> None:
    group, ready = started()
    os.kill(ready[rank].pid, signal.SIGKILL)
    assert group.wait_fault(60).startswith(f"rank {rank} on {ready[0].place.node}: its process died")
    again = group.rebuild()
    other = 1 - rank
    assert again[other].pid == ready[other].pid and again[other].facts["lives"] == 2
    assert again[rank].pid != ready[rank].pid and again[rank].facts["lives"] == 1
    assert again[0].place.address != ready[0].place.address, "they met again elsewhere"
    assert group.wait_fault(0.0) is None
    os.kill(again[other].pid, signal.SIGKILL)
    assert group.wait_fault(60).startswith(f"rank {other} on "), "a rebuilt group is watched"


def test_a_frozen_rank_is_named_ended_and_replaced(started: Callable) -> None:
    group, ready = started()
    time.sleep(0.5)
    os.kill(ready[1].pid, signal.SIGSTOP)
    began = time.monotonic()
    fault = group.wait_fault(60)
    assert time.monotonic() - began > QUICK.silence_s - 1.0, "not before it was silent for that long"
    assert fault.startswith(f"rank 1 on {ready[1].place.node}: its process gives no sign of life: it is frozen")
    again = group.rebuild()
    assert [r.pid == before.pid for r, before in zip(again, ready, strict=True)] == [True, False]
    assert gone(ready[1].pid)


def test_a_rank_with_an_error_of_its_own_is_not_kept(started: Callable) -> None:
    group, ready = started(error_after=0.3)
    assert group.wait_fault(60).endswith("RuntimeError: an error of its own")
    assert group.rebuild()[1].pid != ready[1].pid


def test_after_a_failed_attempt_the_next_one_starts_all_anew(started: Callable) -> None:
    group, ready = started(fail_life=1)
    os.kill(ready[1].pid, signal.SIGKILL)
    group.wait_fault(60)
    with pytest.raises(CheckpointError, match="rank 1 on .* did not start: no checkpoint in this life"):
        group.rebuild()
    again = group.rebuild(keep=False)
    assert [r.facts["lives"] for r in again] == [1, 1]
    assert not {r.pid for r in again} & {r.pid for r in ready} and gone(ready[0].pid)


def test_a_group_without_room_says_so_and_takes_up_when_there_is(
    started: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, ready = started()
    rival = placement_group([{"CPU": 2}])  # waits: one core is free
    release = group._bundles.release

    def release_to_the_rival() -> None:  # whom Ray may ask later than the group, which asks at once
        release()
        assert rival.wait(60)

    monkeypatch.setattr(group._bundles, "release", release_to_the_rival)
    os.kill(ready[0].pid, signal.SIGKILL)
    group.wait_fault(60)
    said: queue.Queue[str] = queue.Queue()
    outcome: queue.Queue[list[Ready]] = queue.Queue()
    work = threading.Thread(target=lambda: outcome.put(group.rebuild(said.put, keep=False)), daemon=True)
    work.start()
    try:
        words = said.get(timeout=100)
        assert words.startswith("waiting for room: the cluster is large enough but busy (1 CPU cores and 0 GPUs are")
        assert work.is_alive()
    finally:
        monkeypatch.undo()
        remove_placement_group(rival)
    assert len(outcome.get(timeout=100)) == 2
    work.join(60)


@pytest.mark.parametrize("seconds", [0.0, 0.4, 0.8, 1.5])
def test_closing_ends_a_rebuild_wherever_it_is_and_leaves_no_process(
    started: Callable, tmp_path: Path, seconds: float
) -> None:
    group, ready = started()
    os.kill(ready[0].pid, signal.SIGKILL)
    group.wait_fault(60)
    outcome: queue.Queue[Exception] = queue.Queue()

    def rebuild() -> None:
        try:
            group.rebuild(make=MakeLasting(str(tmp_path), start_seconds=3.0))
        except WorkerError as error:
            outcome.put(error)

    threading.Thread(target=rebuild, daemon=True).start()
    time.sleep(seconds)
    group.close()
    outcome.get(timeout=60)
    assert gone(ready[1].pid)
    await_free_cores()


@pytest.mark.parametrize(("field", "value"), [("silence_s", 1.0), ("max_restarts", -1), ("restart_window_s", 0.0)])
def test_limits_that_cannot_work_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"placement.{field} is {value:g}"):
        PlacementConfig(**{field: value})  # type: ignore[arg-type]
