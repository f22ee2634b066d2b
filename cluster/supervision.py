"""Threads and tasks that run beside the main path: none of them ends in silence.

What one raises reaches its owner, who heals or ends with words. A watcher whose source is disturbed for a moment asks
again with growing pauses (`Patience`) before it calls that a fault.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0


def supervised(name: str, work: Callable[[], None], failed: Callable[[Exception], None]) -> threading.Thread:
    """A daemon thread that has begun; `failed` is called in it with what `work` raises."""

    def run() -> None:
        try:
            work()
        except Exception as error:
            log.exception("the thread %s failed", name)
            failed(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


async def kept_up(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """`work`, begun again with growing pauses each time it raises; ends as it ends, or cancelled."""
    patience = Patience(float("inf"))
    while True:
        began = time.monotonic()
        try:
            return await work()
        except Exception:
            log.exception("the task %s failed and is begun again", name)
        if time.monotonic() - began > LONGEST_PAUSE_S:
            patience.reset()
        await asyncio.sleep(patience.pause() or LONGEST_PAUSE_S)


class Patience:
    """How long one failure after another is borne: pauses that double, until `limit_s` has passed since the first."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._clock = limit_s, clock
        self._since: float | None = None
        self._next = FIRST_PAUSE_S

    def pause(self) -> float | None:
        """Seconds to wait before the next attempt; None: there were enough."""
        now = self._clock()
        self._since = now if self._since is None else self._since
        if now - self._since >= self._limit_s:
            return None
        pause, self._next = self._next, min(2 * self._next, LONGEST_PAUSE_S)
        return pause

    def reset(self) -> None:
        """An attempt succeeded."""
        self._since, self._next = None, FIRST_PAUSE_S
