"""Whether a group's ranks still answer: a frozen process and one behind a dead link raise nothing by themselves.

Each rank is asked a question every half second, in a thread beside the one that works, and is given up after it has
been silent for the limit. Only time in which the asking process itself ran is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster.actors.group.placement import Place

MOST_S = 1.0
"""What one look counts at most: a process that was itself held up does not take it for its ranks' silence."""
PROBE_S = 3.0


class Heartbeat:
    """Make it when the ranks work, then `beat` about twice a second."""

    def __init__(self, actors: Sequence[Any], limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._actors, self._limit_s, self._clock = actors, limit_s, clock
        self._asked = [actor.pid.remote() for actor in actors]
        self._silent_s = [0.0] * len(actors)
        self._last = clock()

    def beat(self) -> list[int]:
        """The ranks that have been silent for too long. What a dead process's call ends with is an answer, too."""
        now = self._clock()
        passed, self._last = min(now - self._last, MOST_S), now
        answered = self._answered()
        for rank, actor in enumerate(self._actors):
            if self._asked[rank] in answered:
                self._silent_s[rank], self._asked[rank] = 0.0, actor.pid.remote()
            else:
                self._silent_s[rank] += passed
        return [rank for rank, silent_s in enumerate(self._silent_s) if silent_s >= self._limit_s]

    def _answered(self) -> set[ray.ObjectRef]:
        return set(ray.wait(self._asked, num_returns=len(self._asked), timeout=0, fetch_local=False)[0])


def unanswering(actors: Mapping[int, Any], timeout_s: float = PROBE_S) -> list[int]:
    """Those of some ranks that do not answer now, or can no longer be asked."""
    asked = {actor.pid.remote(): rank for rank, actor in actors.items()}
    if asked:
        ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    return [rank for question, rank in asked.items() if not _is_answered(question)]


def _is_answered(question: ray.ObjectRef) -> bool:
    try:
        ray.get(question, timeout=0)
    except (GetTimeoutError, RayError):
        return False
    return True


def outcome(call: ray.ObjectRef) -> BaseException | None:
    """How a call that has ended did: a rank may end in any way, and the fault carries it on."""
    try:
        ray.get(call)
    except Exception as error:  # noqa: BLE001
        return error
    return None


def phase_of(actor: Any, life: int) -> str:
    """Which part of its start a rank is in."""
    try:
        return str(ray.get(actor.phase.remote(life), timeout=2.0))
    except (GetTimeoutError, RayError):
        return "an unknown phase: its process does not answer"


def slow_start(late: Sequence[tuple[Place, Any]], life: int, limit_s: float) -> str:
    """What is said of a group whose ranks `late`, as (place, actor), were not ready within the limit."""
    phases = "; ".join(f"{place} (in {phase_of(actor, life)})" for place, actor in late)
    return (
        f"not ready within {limit_s:g} s: {phases}; "
        "raise placement.start_timeout_s if the checkpoint is large or the disk slow"
    )
