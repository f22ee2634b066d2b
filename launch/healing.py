"""What `serve` does when ranks are lost: rebuilds the group, gives the front-end the new engine, knows when to stop.

    fault -- named by the group --> front-end: RECOVERING --> WorkerGroup.rebuild --> new link --> Frontend.reattach

The first attempt keeps the ranks that survived; after one that failed all are started again. Each attempt counts, and
too many within a window end the server with the cause. Waiting for room is no attempt. What the front-end and the
group do on their side is theirs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster.actors.group import WorkerGroup
from cluster.actors.place import PlacementConfig
from cluster.actors.spec import RankFacts, ServeSpec
from cluster.actors.worker import Ready
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.socket_link import SocketLink
from cluster.training.calls import Kind, RestorePoint, TrainCall
from parallel.errors import TpError, WorkerError

log = logging.getLogger(__name__)
CAUSE_S = 12.0
"""How long the group may take to find the cause of what the link to rank 0 noticed first."""
FIRST_DELAY_S, MOST_DELAY_S = 1.0, 30.0
REMINDER_S = 30.0


class Restarts:
    """How many attempts there were within the window, and how long to wait before the next."""

    def __init__(self, config: PlacementConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._window_s, self._clock = config.max_restarts, config.restart_window_s, clock
        self._times: deque[float] = deque()
        self.total = 0

    def next_delay(self) -> float | None:
        """Seconds to wait before one more attempt, which is counted; None where there were enough."""
        now = self._clock()
        while self._times and now - self._times[0] > self._window_s:
            self._times.popleft()
        before = len(self._times)
        if before >= self._most:
            return None
        self._times.append(now)
        self.total += 1
        return 0.0 if before == 0 else min(FIRST_DELAY_S * 2.0 ** (before - 1), MOST_DELAY_S)


class Healer:
    """Keeps an engine behind a front-end. `run` ends only by raising: what cannot be healed, with the cause."""

    def __init__(self, group: WorkerGroup, frontend: Frontend, spec: ServeSpec, ready: Sequence[Ready]) -> None:
        self._group, self._frontend = group, frontend
        self._facts: RankFacts = ready[0].facts
        # as many blocks as before: what was admitted fits again
        self._spec = replace(spec, engine=replace(spec.engine, kv_blocks=self._facts.kv_blocks))
        self._restarts = Restarts(group.config)
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._told, self._told_at = "", 0.0
        frontend.observe(self._follow)
        group.observe(self._group_failed)

    async def run(self) -> None:
        """Until a fault that is one too many."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._frontend.fleet.has_engine and self._group.wait_fault(0.0) is None:
                continue  # old news
            began = time.monotonic()
            cause = await asyncio.to_thread(self._group.wait_fault, CAUSE_S)
            if cause is None and await self._reconnected():
                continue
            cause = cause or self._frontend.fault_cause
            self._group.give_up(cause)  # of no effect where it has failed
            self._frontend.fault(cause)
            await self._heal(cause)
            log.warning("serving again %.1f s after the fault was seen: %s", time.monotonic() - began, cause)

    async def _heal(self, cause: str) -> None:
        """Attempt after attempt until one succeeds."""
        keep, failed = True, ""
        while not await self._attempted(cause, keep, failed):
            keep, failed = False, self._frontend.fault_cause

    async def _attempted(self, cause: str, keep: bool, failed: str) -> bool:
        """Whether one more attempt succeeded; raises where none is left, or none can be right."""
        delay = self._restarts.next_delay()
        if delay is None:
            raise self._exhausted(cause, failed)
        await asyncio.sleep(delay)
        try:
            point = self._frontend.weights.restore_point()
        except WorkerError as error:
            raise Unhealable(f"the engine is gone: {cause}; {error}") from error
        try:
            await self._rebuild(point, keep)
        except TpError as error:
            log.error("the group could not be rebuilt: %s", error)
            self._frontend.waits_for(str(error))
            return False
        return True

    async def _rebuild(self, point: RestorePoint | None, keep: bool) -> None:
        spec = replace(self._spec, restore=point)
        ready = await asyncio.to_thread(self._group.rebuild, self._tell, spec, keep)
        self._facts = ready[0].facts
        link = await self._connect()
        lost = self._frontend.weights.rebuilt(point)
        if lost:
            log.error("%s", lost)
        await self._frontend.reattach(link)

    async def _connect(self) -> SocketLink:
        assert self._facts.engine_address is not None, "rank 0 has an engine"
        return await asyncio.to_thread(SocketLink, self._facts.engine_address, self._spec.authkey)

    async def _reconnected(self) -> bool:
        """Whether it was only the connection: the ranks work, and rank 0 takes the front-end back."""
        try:
            link = await self._connect()
        except WorkerError as error:
            log.error("the engine cannot be reached: %s", error)
            return False
        await self._frontend.reattach(link)
        if self._spec.training.enabled:  # what was under way may have been applied unheard
            asked = asyncio.wrap_future(link.train(TrainCall(kind=Kind.STATE)))
            try:
                self._frontend.weights.seen(await asyncio.wait_for(asked, CAUSE_S))
            except TimeoutError:
                return False
        log.warning("the connection to rank 0 was lost and made again")
        return True

    def _group_failed(self, _: str) -> None:
        """In the group's own thread."""
        self._loop.call_soon_threadsafe(self._news.set)

    def _follow(self, state: State) -> None:
        if state in (State.RECOVERING, State.FAILED):
            self._news.set()

    def _tell(self, what: str) -> None:
        """What a rebuild waits for: to the log now and then, and to whoever asks for the state."""
        self._loop.call_soon_threadsafe(self._frontend.waits_for, what)
        now = time.monotonic()
        if what != self._told or now - self._told_at >= REMINDER_S:
            self._told, self._told_at = what, now
            log.warning("%s", what)

    def _exhausted(self, cause: str, failed: str) -> Unhealable:
        config = self._group.config
        if config.max_restarts == 0:
            return Unhealable(f"the engine is gone: {cause}")
        again = f"; the last attempt to rebuild the group failed: {failed}" if failed else ""
        return Unhealable(
            f"the engine is gone: {cause}{again}; {config.max_restarts} restarts within {config.restart_window_s:g} s "
            "are the limit (placement.max_restarts)"
        )


class Unhealable(WorkerError):
    """No further attempt is made."""
