"""Who is asked to end, waited for, killed by Ray, and killed without it; Ray is played."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.actors.group import shutdown as module
from cluster.actors.group.shutdown import HEARD_S, end_ranks


class PlayedRay:
    """`deaf` ranks do not hear; waits are noted with their limits."""

    def __init__(self, deaf: Sequence[int] = ()) -> None:
        self.deaf, self.killed, self.waits, self.signalled = deaf, [], [], []  # type: ignore[var-annotated]

    def actor(self, rank: int) -> Any:
        return SimpleNamespace(rank=rank, stop=SimpleNamespace(remote=lambda life: f"stop {rank} in life {life}"))

    def wait(self, refs: list[str], num_returns: int, timeout: float, **_: Any) -> tuple[list[str], list[str]]:
        assert num_returns == len(refs)
        self.waits.append((tuple(refs), timeout))
        late = [ref for ref in refs if ref.startswith("stop") and int(ref.split()[1]) in self.deaf]
        return [ref for ref in refs if ref not in late], late

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.rank)


def ended(monkeypatch: pytest.MonkeyPatch, deaf: Sequence[int], pids: Sequence[int | None] | None) -> PlayedRay:
    ray = PlayedRay(deaf)
    monkeypatch.setattr(module, "ray", ray)
    monkeypatch.setattr(module.os, "kill", lambda pid, number: ray.signalled.append((pid, number)))
    end_ranks([ray.actor(0), ray.actor(1)], ["run 0", "run 1"], 3, 60.0, pids)  # type: ignore[list-item]
    assert ray.killed == [0, 1]
    return ray


def test_ranks_that_hear_it_have_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = ended(monkeypatch, [], [11, None])
    asked, runs = (("stop 0 in life 3", "stop 1 in life 3"), HEARD_S), (("run 0", "run 1"), 60.0)
    assert ray.waits == [asked, runs, runs] and not ray.signalled


def test_one_that_does_not_is_killed_without_ray_where_it_is_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = ended(monkeypatch, [1], [11, 12])
    assert ray.signalled == [(12, signal.SIGKILL)]
    assert ray.waits[1] == (("run 0",), 60.0), "nobody waits for it to end by itself"
    assert not ended(monkeypatch, [1], [11, None]).signalled


def test_a_group_that_failed_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(monkeypatch, [0, 1], None).waits == [(("run 0", "run 1"), 60.0)]
