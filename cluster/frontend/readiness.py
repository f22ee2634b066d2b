"""Whether the engine can answer, proved by a canary through every rank: at the start, after every change, and now and
then.

A front-end's state says what it believes; this says what was tried. A canary that does not come back in time, or that
finds something wrong, makes the server not ready until one succeeds. While a training call is under way the engine is
busy by right: then a late canary changes nothing. No request is refused here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cluster.frontend.frontend import Frontend, State
from parallel.errors import TpError

log = logging.getLogger(__name__)


class Readiness:
    """Make it beside a front-end, in its event loop; `prove` once, then keep `run` running."""

    def __init__(self, frontend: Frontend, every_s: float = 10.0, timeout_s: float = 20.0) -> None:
        self._frontend, self._every_s, self._timeout_s = frontend, every_s, timeout_s
        self._observers: list[Callable[[bool], None]] = []
        self._wake = asyncio.Event()
        self.ready = False
        self.reason = "no canary has been sent yet"
        self.failures = 0
        frontend.observe(self._follow)

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
        """One canary; whether the server is ready."""
        try:
            load = await self._frontend.load(self._timeout_s, prove=True)
        except TpError as error:
            if not self._frontend.training_under_way or not self._frontend.has_engine:
                self._become(False, f"a canary did not come back: {error}")
            return self.ready
        if self._frontend.state is State.SERVING:
            self._become(not load.canary_fault, load.canary_fault)
        return self.ready

    def _follow(self, state: State) -> None:
        if state is State.SERVING:
            self._wake.set()
        else:
            self._become(False, f"the server is {state.value}")

    def _become(self, ready: bool, reason: str) -> None:
        if not ready and self._frontend.state is State.SERVING:
            self.failures += 1
            log.error("not ready: %s", reason)
        changed = ready is not self.ready
        self.ready, self.reason = ready, reason
        if changed:
            for observer in self._observers:
                observer(ready)
