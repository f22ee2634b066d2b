"""When suspects (quarantine.py) go on: once there is an engine that has proved to work without them.

Those that were at one death go together. One that was at two is tried alone: no other suspect is on any engine until it
is cleared, has ended, or is guilty. What is not suspected goes on at once beside them. In the event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from cluster.frontend.fleet.fleet import Fleet
from cluster.frontend.fleet.open_requests import Entry
from cluster.frontend.requests.quarantine import Quarantine


class SuspectTrials:
    """Whose turn it is."""

    def __init__(self, fleet: Fleet, quarantine: Quarantine) -> None:
        self._fleet, self._quarantine = fleet, quarantine
        self._waiting: list[Entry] = []
        self._seated: list[Entry] = []  # suspects that are on an engine and were not cleared
        self._held = 0
        self.quiet = asyncio.Event()
        """Set while no suspect is being tried."""
        self.quiet.set()
        fleet.when_proved(self._next)

    def submit(self, entries: Iterable[Entry], resumed: bool = False) -> None:
        """To the engines: what is not suspected at once, the others in their turn."""
        free = []
        for entry in entries:
            if entry.suspicion is None:
                free.append(entry)
                if entry in self._waiting:
                    self._waiting.remove(entry)
            elif entry not in self._waiting:
                self._waiting.append(entry)
        self._fleet.submit(free, resumed)
        self._next()

    def took(self, entry: Entry, sample_index: int, tokens: int) -> None:
        """A suspect has gone on."""
        self._quarantine.gained(entry, sample_index, tokens)
        self._next()

    def ended(self, entry: Entry) -> None:
        """However it did."""
        if entry in self._waiting:
            self._waiting.remove(entry)
        self._next()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """For a suspect of another kind: while no request is being tried, and none is meanwhile."""
        self._held += 1
        try:
            await self.quiet.wait()
            yield
        finally:
            self._held -= 1
            self._next()

    def _next(self) -> None:
        self._seated = [entry for entry in self._seated if entry.suspicion is not None and entry.seat is not None]
        while self._waiting and not self._held and self._fleet.proved:
            entry = min(self._waiting, key=_deaths)
            if self._seated and any(map(_alone, (entry, *self._seated))):
                break
            self._waiting.remove(entry)
            self._seated.append(entry)
            self._fleet.submit([entry], resumed=True)
        (self.quiet.clear if self._seated else self.quiet.set)()


def _deaths(entry: Entry) -> tuple[bool, int]:
    return _alone(entry), 0 if entry.suspicion is None else len(entry.suspicion.deaths)


def _alone(entry: Entry) -> bool:
    return entry.suspicion is not None and entry.suspicion.alone
