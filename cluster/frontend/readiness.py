"""Whether the engines can answer, proved by canaries through every rank of every replica: at the start, after every
change, and now and then.

A front-end's state says what it believes; this says what was tried. A canary that does not come back in time, or that
finds something wrong, puts its replica in doubt until one succeeds: nothing new goes there while another will do, and
where none will the server is not ready. FAILURES in a row condemn the engine, which then is replaced: late ones of one
that says nothing else meanwhile either, and wrong ones of one that was right before. While a training call is under
way the engine is busy by right: then a late canary changes nothing, but for TRAINING_PATIENCE of them. No request is
refused here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from cluster.engine.request import EngineLoad
from cluster.frontend.fleet.fleet import NO_CANARY
from cluster.frontend.fleet.open_requests import AttachedEngine
from cluster.frontend.frontend import Frontend, State

log = logging.getLogger(__name__)
FAILURES = 2
"""So many canaries in a row that fail condemn an engine."""
TRAINING_PATIENCE = 30
"""So many in a row that are late while it trains, and says nothing, do."""
Condemn = Callable[[int, str], None]
"""Is told which replica's engine has to be replaced, and why."""


class Readiness:
    """Make it beside a front-end, in its event loop; `prove` once, then keep `run` running."""

    def __init__(
        self, frontend: Frontend, every_s: float = 10.0, timeout_s: float = 20.0, condemn: Condemn | None = None
    ) -> None:
        self._frontend, self._every_s, self._timeout_s, self._condemn = frontend, every_s, timeout_s, condemn
        self._observers: list[Callable[[bool], None]] = []
        self._wake = asyncio.Event()
        self.ready = False
        self.reason = NO_CANARY
        self.failures = 0
        frontend.fleet.canaries = True
        frontend.observe(self._follow)
        frontend.fleet.observe(self._changed)
        self._changed()

    def observe(self, observer: Callable[[bool], None]) -> None:
        """Be told whether the server is ready, beginning with now."""
        self._observers.append(observer)
        observer(self.ready)

    async def run(self) -> None:
        """For ever: a canary every so often, and at once when an engine took over."""
        while True:
            try:
                async with asyncio.timeout(self._every_s):
                    await self._wake.wait()
            except TimeoutError:
                pass  # it is time
            self._wake.clear()
            if self._frontend.state is State.SERVING:
                await self.prove()

    async def prove(self) -> bool:
        """One canary to every replica that has an engine; whether the server is ready."""
        frontend, asked = self._frontend, time.monotonic()
        for seat, outcome in (await frontend.fleet.ask(self._timeout_s, prove=True)).items():
            if isinstance(outcome, EngineLoad):
                self._answered(seat, outcome.canary_fault)
            else:
                self._late(seat, f"a canary did not come back: {outcome}", busy=seat.heard >= asked)
        self._settle()
        return self.ready

    def _answered(self, seat: AttachedEngine, fault: str) -> None:
        seat.late = 0
        seat.wrong = seat.wrong + 1 if fault else 0
        seat.right |= not fault
        self._judge(seat, fault)
        # wrong from its first canary on it is the checkpoint; and what was trained and not saved may yet be mended
        if seat.wrong >= FAILURES and seat.right and not self._frontend.weights.unsaved:
            self._replace(seat, f"{seat.wrong} canaries in a row were wrong: {fault}")

    def _late(self, seat: AttachedEngine, doubt: str, busy: bool) -> None:
        seat.late = 0 if busy else seat.late + 1
        training = self._frontend.training_under_way
        if not (training and self._frontend.fleet.replicas[seat.replica].seat):
            self._judge(seat, doubt)
        if seat.late >= (TRAINING_PATIENCE if training else FAILURES):
            self._replace(seat, f"its engine hangs: {seat.late} canaries in a row did not come back, and nothing else")

    def _judge(self, seat: AttachedEngine, doubt: str) -> None:
        if doubt:
            self.failures += 1
            log.error("replica %d is not relied on: %s", seat.replica, doubt)
        self._frontend.fleet.judge(seat, doubt)

    def _replace(self, seat: AttachedEngine, cause: str) -> None:
        if self._condemn is not None and self._frontend.fleet.replicas[seat.replica].seat is seat:
            seat.late = seat.wrong = 0
            self._condemn(seat.replica, cause)

    def _follow(self, state: State) -> None:
        self._settle()

    def _changed(self) -> None:
        """A replica has another engine, or none: those that have proved nothing yet are asked at once."""
        if any(replica.seat and replica.doubt for replica in self._frontend.fleet.replicas):
            self._wake.set()
        self._settle()

    def _settle(self) -> None:
        """Ready is who serves with at least one replica that nothing speaks against."""
        state, replicas = self._frontend.state, self._frontend.fleet.replicas
        if state is not State.SERVING:
            self._become(False, f"the server is {state.value}")
            return
        doubts = {replica.index: replica.doubt if replica.seat else replica.fault for replica in replicas}
        ready = not all(doubts.values())
        words = doubts[0] if len(doubts) == 1 else "; ".join(f"replica {i}: {why}" for i, why in doubts.items())
        self._become(ready, "" if ready else words)

    def _become(self, ready: bool, reason: str) -> None:
        changed = ready is not self.ready
        self.ready, self.reason = ready, reason
        if changed:
            for observer in self._observers:
                observer(ready)
