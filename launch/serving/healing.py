"""What `serve` does when ranks of a replica are lost, or are to start anew: rebuilds the group, gives the front-end the
new engine, knows when to stop.

    fault -- named by the group --> Frontend.fault --> WorkerGroup.rebuild --> new link --> Frontend.reattach

The first attempt keeps the ranks that survived; after one that failed, in whatever way, all are started again. Each
attempt counts, and too many within a window are the end of this replica, with the cause. Waiting for room is no
attempt, nor is a restart that was asked for, nor one after a death for which a request was quarantined. What the
front-end and the group do on their side is theirs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.actors.group.placement import PlacementConfig
from cluster.actors.group.worker import Ready
from cluster.actors.group.worker_group import WorkerGroup
from cluster.actors.programs.serve_program import ServeProgram
from cluster.actors.programs.serve_spec import RankFacts
from cluster.frontend.frontend import Frontend, State
from cluster.link.socket_link import SocketLink
from cluster.request_errors import Draining, RestartRefused
from cluster.training.train_calls import Kind, RestorePoint, TrainCall
from parallel.errors import TpError, WorkerError

log = logging.getLogger(__name__)
CAUSE_S = 12.0
"""How long the group may take to find the cause of what the link to rank 0 noticed first."""
FIRST_DELAY_S, MOST_DELAY_S = 1.0, 30.0
REMINDER_S = 30.0
CANARY_S = 30.0
CONNECTS, CONNECT_PAUSE_S = 3, 0.5
"""How often a rebuilt engine is connected to before its group is rebuilt once more, and the pause between."""
ENDING = (State.DRAINING, State.FAILED, State.CLOSED)
RESTARTED = "it is restarted because somebody asked for it"


class Restarts:
    """How many attempts there were within the window, and how long to wait before the next."""

    def __init__(self, config: PlacementConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._window_s, self._clock = config.max_restarts, config.restart_window_s, clock
        self._times: deque[float] = deque()
        self._free = False  # the next one does not count
        self.total = 0

    def next_delay(self) -> float | None:
        """Seconds to wait before one more attempt, which is counted; None where there were enough."""
        now = self._clock()
        while self._times and now - self._times[0] > self._window_s:
            self._times.popleft()
        if self._free:
            self._free, self.total = False, self.total + 1
            return 0.0
        before = len(self._times)
        if before >= self._most:
            return None
        self._times.append(now)
        self.total += 1
        return 0.0 if before == 0 else min(FIRST_DELAY_S * 2.0 ** (before - 1), MOST_DELAY_S)

    def pardon(self, past: int, next_too: bool) -> None:
        """So many of the last ones, and the next one, do not count: what they are for was found and will not return."""
        for _ in range(min(past, len(self._times))):
            self._times.pop()
        self._free |= next_too


@dataclass(frozen=True)
class Order:
    """A restart that was asked for: how long open requests may take to end, and who waits for how many did not."""

    grace_s: float
    done: asyncio.Future[int]


class Healer:
    """Keeps an engine in one replica's place. `run` ends only by raising: what cannot be healed, with the cause."""

    def __init__(
        self, group: WorkerGroup, frontend: Frontend, spec: ServeProgram, ready: Sequence[Ready], replica: int = 0
    ) -> None:
        self._group, self._frontend = group, frontend
        self._replica = frontend.fleet.replicas[replica]
        self._ready = ready
        self._facts: RankFacts = ready[0].facts
        # as many blocks as before: what was admitted fits again
        self._spec = replace(spec, engine=replace(spec.engine, kv_blocks=self._facts.kv_blocks))
        self._restarts = Restarts(group.config)
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._told, self._told_at = "", 0.0
        self._order: Order | None = None
        self._condemned = False
        frontend.fleet.observe(self._follow)
        group.observe(self._group_failed)

    async def run(self) -> None:
        """Until a fault that is one too many."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._order is not None:
                await self._restart(self._order)
            elif self._replica.seat is None or self._group.wait_fault(0.0) is not None:
                await self._mend()

    def condemn(self, cause: str) -> None:
        """The engine is there but does not work, by its canary: its ranks are ended, others take their place."""
        self._condemned = True
        cause = f"{self._ready[0].place}: {cause}"
        self._group.give_up(cause)
        self._frontend.fault(cause, self._replica.index)

    async def restart(self, grace_s: float) -> int:
        """Ends the replica's ranks and starts them anew, though nothing is wrong with them. Nothing new goes there;
        what is open there and does not end within the time goes on elsewhere, or waits: returns how much that was.
        """
        self._order = Order(grace_s, self._loop.create_future())
        self._news.set()
        return await self._order.done

    async def ordered(self) -> None:
        """Waits for an order."""
        while self._order is None:
            await self._news.wait()
            self._news.clear()
        self._news.set()

    async def _mend(self) -> None:
        """After a fault: what it was, and another engine."""
        began = time.monotonic()
        cause = await asyncio.to_thread(self._group.wait_fault, CAUSE_S)
        if cause is None and await self._reconnected():
            return
        cause = cause or self._replica.fault
        self._group.give_up(cause)  # of no effect where it has failed
        self._frontend.fault(cause, self._replica.index)
        keep, self._condemned = not self._condemned, False
        await self._heal(cause, keep)
        log.warning("serving again %.1f s after the fault was seen: %s", time.monotonic() - began, cause)

    async def _restart(self, order: Order) -> None:
        try:
            handed_over = await self._vacate(order.grace_s)
            check_restart(self._frontend)
            self._frontend.release(RESTARTED, self._replica.index)
            self._group.give_up(RESTARTED)
            if not await self._tried(keep=False):
                await self._heal(RESTARTED, keep=False)
            await self._prove()
        except Exception as error:
            expected = isinstance(error, TpError)
            order.done.set_exception(error if expected else WorkerError(f"the restart failed: {error!r}"))
            if isinstance(error, Unhealable) or not expected:
                raise
        else:
            order.done.set_result(handed_over)
        finally:
            self._order = None
            self._frontend.fleet.hold(self._replica.index, False)

    async def _vacate(self, grace_s: float) -> int:
        """Nothing new goes there, and what is open has some time, as long as others can take what comes meanwhile;
        how much is left then."""
        replica, fleet = self._replica, self._frontend.fleet
        fleet.hold(replica.index, True)
        try:
            async with asyncio.timeout(grace_s if len(fleet.replicas) > 1 else 0.0):
                await fleet.until(lambda: self._ending or not (replica.seat and replica.seat.open))
        except TimeoutError:
            pass  # the rest is handed over
        await fleet.until(lambda: self._ending or self.others_serve or replica.seat is None)
        return len(replica.seat.open) if replica.seat else 0

    @property
    def others_serve(self) -> bool:
        """Whether every other replica has an engine that nothing speaks against."""
        others = [each for each in self._frontend.fleet.replicas if each is not self._replica]
        return all(each.seat and not each.doubt for each in others)

    @property
    def _ending(self) -> bool:
        return self._frontend.state in ENDING

    async def _prove(self) -> None:
        """A canary through every rank of the new engine, before anything new goes there."""
        seat = self._replica.seat
        if seat is None:
            raise WorkerError(f"replica {self._replica.index} was lost again while it started: {self._replica.fault}")
        load = await asyncio.to_thread(seat.link.load, CANARY_S, True)
        self._frontend.fleet.judge(seat, load.canary_fault)
        if load.canary_fault:
            raise WorkerError(f"replica {self._replica.index} was started anew, and its canary: {load.canary_fault}")

    async def _heal(self, cause: str, keep: bool = True) -> None:
        """Attempt after attempt until one succeeds; raises where none is left."""
        failed = ""
        while True:
            self._restarts.pardon(*self._frontend.quarantine.pardons(self._replica.index))
            delay = self._restarts.next_delay()
            if delay is None:
                raise self._exhausted(cause, failed)
            await asyncio.sleep(delay)
            if await self._tried(keep, cause):
                return
            keep, failed = False, self._replica.fault

    async def _tried(self, keep: bool, cause: str = RESTARTED) -> bool:
        """Whether one attempt succeeded; raises where none can be right."""
        try:
            point = self._frontend.weights.restore_point()
        except WorkerError as error:
            raise Unhealable(f"the engine is gone: {cause}; {error}") from error
        try:
            await self._rebuild(point, keep)
        except Exception as error:
            expected = isinstance(error, TpError)
            words = str(error) if expected else f"unexpected {type(error).__name__}: {error}"
            log.error("the group could not be rebuilt: %s", words, exc_info=not expected)
            self._frontend.waits_for(words, self._replica.index)
            return False
        return True

    async def _rebuild(self, point: RestorePoint | None, keep: bool) -> None:
        spec = replace(self._spec, restore=point)
        ready = await asyncio.to_thread(self._group.rebuild, self._tell, spec, keep)
        self._ready, self._facts = ready, ready[0].facts
        link = await self._connect_patiently()
        lost = self._frontend.weights.rebuilt(point)
        if lost:
            log.error("%s", lost)
        await self._frontend.reattach(link, self._replica.index)

    async def _connect(self) -> SocketLink:
        address = self._facts.engine_address
        if address is None:
            raise WorkerError("rank 0 reported no engine to connect to; all ranks must run the same version")
        return await asyncio.to_thread(SocketLink, address, self._spec.authkey)

    async def _connect_patiently(self) -> SocketLink:
        """To a rank 0 that has just said that it is ready."""
        for _ in range(CONNECTS - 1):
            try:
                return await self._connect()
            except WorkerError as error:
                log.warning("tried again: %s", error)
                await asyncio.sleep(CONNECT_PAUSE_S)
        return await self._connect()

    async def _reconnected(self) -> bool:
        """Whether it was only the connection: the ranks work, and rank 0 takes the front-end back."""
        try:
            link = await self._connect()
            self._frontend.quarantine.absolve(self._replica.index)  # nothing died
            await self._frontend.reattach(link, self._replica.index)
            if self._spec.training.enabled:  # what was under way may have been applied unheard
                asked = asyncio.wrap_future(link.train(TrainCall(kind=Kind.STATE)))
                self._frontend.weights.seen(await asyncio.wait_for(asked, CAUSE_S))
        except (TpError, TimeoutError) as error:
            log.error("the engine cannot be reached: %s", error)
            return False
        log.warning("the connection to rank 0 was lost and made again")
        return True

    def _group_failed(self, _: str) -> None:
        """In the group's own thread."""
        self._loop.call_soon_threadsafe(self._news.set)

    def _follow(self) -> None:
        if self._replica.seat is None:
            self._news.set()

    def _tell(self, what: str) -> None:
        """What a rebuild waits for: to the log now and then, and to whoever asks for the state."""
        self._loop.call_soon_threadsafe(self._frontend.waits_for, what, self._replica.index)
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


def check_restart(frontend: Frontend) -> None:
    """Raises where ending ranks now would lose something, or is of no use."""
    if frontend.state in ENDING:
        raise Draining("the server is stopping: what was not restarted yet stays as it is")
    if frontend.weights.unsaved or frontend.training_under_way:
        raise RestartRefused(
            "what was trained since the last saved state is in the ranks' memory alone and would be lost; save it "
            "(SaveState), then restart"
        )


class Unhealable(WorkerError):
    """No further attempt is made."""
