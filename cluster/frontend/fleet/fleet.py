"""The replicas behind a front-end: which has an engine, what is open where, and who gets what comes next.

An engine in a replica's place is an `AttachedEngine`. An open request sits on one or, where no replica has an engine,
on none; events are taken from the seat it sits on and no other, so what a lost engine says late is never heard. Why a
replica is out is kept here; what that means for the server's state, and for readers, is the front-end's business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster.engine.request import EngineLoad, ModelLimits, Request
from cluster.frontend.fleet.open_requests import AttachedEngine, Entry
from cluster.frontend.fleet.routing import Router
from cluster.frontend.requests.call import RoutingConfig
from cluster.link.engine_link import EngineLink, LinkEvent
from parallel.errors import TpError

log = logging.getLogger(__name__)
NO_CANARY = "no canary has been sent yet"


@dataclass(frozen=True)
class Restarted:
    """What a rolling restart did."""

    replicas: int
    handed_over: int  # requests that did not end within the grace time and went on elsewhere


@dataclass(eq=False)
class Replica:
    """One place for an engine. `link` is that of the present engine, or of the last one."""

    index: int
    link: EngineLink
    seat: AttachedEngine | None = None
    fault: str = ""  # why there is no engine
    doubt: str = NO_CANARY  # why it is not relied on; nothing: its last canary came back
    held: bool = False  # nothing new goes there while others can take it
    restarts: int = 0  # how often another engine, or another connection to it, took over


Events = Callable[[AttachedEngine, Sequence[LinkEvent]], None]
Faults = Callable[[str, int], None]


class Fleet:
    """All replicas of a server. In the front-end's event loop only; links' threads hand over."""

    def __init__(
        self, links: Sequence[EngineLink], loop: asyncio.AbstractEventLoop, config: RoutingConfig | None = None
    ) -> None:
        assert links, "a front-end has at least one engine"
        self.replicas = [Replica(index, link) for index, link in enumerate(links)]
        self.router = Router(len(links), config)
        self._loop = loop
        self._observers: list[Callable[[], None]] = []
        self._provers: list[Callable[[], None]] = []
        self.canaries = False
        """Whether somebody proves engines by canaries: what depends on that waits for it."""
        self._moved = asyncio.Event()
        self._asking: asyncio.Task[dict[AttachedEngine, EngineLoad | TpError]] | None = None
        self._on_events: Events
        self._on_fault: Faults

    def start(self, on_events: Events, on_fault: Faults) -> None:
        """Begin to listen to every engine."""
        self._on_events, self._on_fault = on_events, on_fault
        for replica in self.replicas:
            self._sit(replica, replica.link)
        self._tell()

    # ------------------------------------------------------------ what there is

    @property
    def has_engine(self) -> bool:
        return any(replica.seat for replica in self.replicas)

    @property
    def proved(self) -> bool:
        """Whether some engine is there that has proved to work; where nobody sends canaries, whether one is there."""
        return any(replica.seat and (replica.seat.proved or not self.canaries) for replica in self.replicas)

    def when_proved(self, observer: Callable[[], None]) -> None:
        """Be told whenever an engine has."""
        self._provers.append(observer)

    def prove(self, seat: AttachedEngine) -> None:
        """It works: it has answered something."""
        if not seat.proved:
            seat.proved = True
            for observer in self._provers:
                observer()

    @property
    def limits(self) -> ModelLimits:
        """What every replica can do: a request that is admitted may have to go on with any of them."""
        all_limits = [replica.link.limits for replica in self.replicas]
        return replace(all_limits[0], kv_capacity_tokens=min(each.kv_capacity_tokens for each in all_limits))

    @property
    def fault(self) -> str:
        """Why replicas are out."""
        if len(self.replicas) == 1:
            return self.replicas[0].fault
        return "; ".join(f"replica {each.index}: {each.fault}" for each in self.replicas if each.fault)

    def observe(self, observer: Callable[[], None]) -> None:
        """Be told whenever a replica gets, loses or is no longer kept from work."""
        self._observers.append(observer)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that follows from a replica's change, or from a request's end."""
        while not condition():
            await self._moved.wait()

    async def ask(self, timeout: float, prove: bool = False) -> dict[AttachedEngine, EngineLoad | TpError]:
        """Every engine's counters, or why it gave none; to `prove`, after a canary through every rank."""
        if prove:
            return await self._ask(timeout, prove)
        if self._asking is None or self._asking.done():  # who asks meanwhile gets the same answer
            self._asking = asyncio.create_task(self._ask(timeout))
        return await asyncio.shield(self._asking)

    async def _ask(self, timeout: float, prove: bool = False) -> dict[AttachedEngine, EngineLoad | TpError]:
        seats = [replica.seat for replica in self.replicas if replica.seat]
        asked = (asyncio.to_thread(seat.link.load, timeout, prove) for seat in seats)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, TpError):
                raise answer
        return dict(zip(seats, answers, strict=True))  # type: ignore[arg-type]

    # ------------------------------------------------------------ requests

    def submit(self, entries: Sequence[Entry], resumed: bool = False) -> None:
        """Each to an engine; `resumed`: from where it stopped. Without any engine they wait for one."""
        now = time.monotonic()
        batches: dict[AttachedEngine, list[Request]] = {}
        for entry in entries:
            seat = self._choose(entry)
            if seat is not None:
                seat.take(entry)
                batches.setdefault(seat, []).append(entry.resumed(now) if resumed else entry.request)
        for seat, requests in batches.items():
            seat.link.submit(requests)

    def abort(self, entries: Sequence[Entry]) -> None:
        """The engines need not go on with these."""
        batches: dict[AttachedEngine, list[str]] = {}
        for entry in entries:
            if entry.seat is not None:
                batches.setdefault(entry.seat, []).append(entry.request.request_id)
        for seat, request_ids in batches.items():
            seat.link.abort(request_ids, ())

    def abort_sample(self, entry: Entry, sample_index: int) -> None:
        """Nor with this one sample."""
        if entry.seat is not None:
            entry.seat.link.abort((), [(entry.request.request_id, sample_index)])

    def leave(self, entry: Entry) -> None:
        """The request is over."""
        if entry.seat is not None:
            entry.seat.leave(entry)
            self.wake()

    def _choose(self, entry: Entry) -> AttachedEngine | None:
        """Among those that nothing speaks against; else those that are only in doubt; else any that has an engine."""
        seated = [replica for replica in self.replicas if replica.seat]
        free = [replica for replica in seated if not replica.held]
        candidates = [replica for replica in free if not replica.doubt] or free or seated
        outstanding = {replica.index: replica.seat.tokens for replica in candidates if replica.seat}
        if not outstanding:
            return None
        return self.replicas[self.router.choose(entry.request.token_ids, outstanding)].seat

    # ------------------------------------------------------------ engines come and go

    def attach(self, index: int, link: EngineLink) -> EngineLink:
        """Another engine takes the replica's place; returns the link of the one before, which is still open."""
        replica = self.replicas[index]
        self._empty(replica)
        old, replica.restarts = replica.link, replica.restarts + 1
        self._sit(replica, link)
        self._tell()
        return old

    def lose(self, index: int, cause: str) -> list[Entry]:
        """A replica has no engine any more; returns what was open there, which now sits nowhere."""
        replica = self.replicas[index]
        replica.fault = cause
        left = self._empty(replica)
        self._tell()
        return left

    def hold(self, index: int, held: bool) -> None:
        """Keep new requests from a replica while others can take them, or no longer."""
        self.replicas[index].held = held
        self._tell()

    def judge(self, seat: AttachedEngine, doubt: str) -> None:
        """What a canary said of an engine; nothing: all is well."""
        replica = self.replicas[seat.replica]
        if replica.seat is seat:
            replica.doubt = doubt
            if not doubt:
                self.prove(seat)
            self.wake()

    async def close(self, timeout: float) -> None:
        """Listen to no engine any more and let go of all."""
        for replica in self.replicas:
            self._empty(replica)
        await asyncio.gather(*(asyncio.to_thread(replica.link.close, timeout) for replica in self.replicas))

    def _sit(self, replica: Replica, link: EngineLink) -> None:
        seat = AttachedEngine(replica.index, link)
        link.start(partial(self._hand_over, self._on_events, seat), partial(self._hand_over, self._hear_fault, seat))
        replica.seat, replica.link, replica.fault, replica.doubt = seat, link, "", NO_CANARY

    def _empty(self, replica: Replica) -> list[Entry]:
        seat, replica.seat = replica.seat, None
        self.router.forget(replica.index)
        left = list(seat.open.values()) if seat else []
        for entry in left:
            entry.seat = None
        return left

    def _hand_over(self, target: Callable[[AttachedEngine, Any], None], seat: AttachedEngine, news: object) -> None:
        """Runs in a link's thread. What comes after the loop has closed has no reader."""
        try:
            self._loop.call_soon_threadsafe(target, seat, news)
        except RuntimeError:
            log.debug("dropped news of an engine: the event loop is closed")

    def _hear_fault(self, seat: AttachedEngine, cause: str) -> None:
        if self.replicas[seat.replica].seat is seat:
            self._on_fault(cause, seat.replica)

    def _tell(self) -> None:
        for observer in self._observers:
            observer()
        self.wake()

    def wake(self) -> None:
        """Those who wait look again."""
        self._moved.set()
        self._moved.clear()
