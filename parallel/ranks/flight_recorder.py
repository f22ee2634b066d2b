"""A rank's flight recorder: the last commands and collectives it began, in a ring that costs next to nothing to keep.

One tuple is stored per event; nothing is counted, formatted or written before somebody asks for the `records`. Kept by
every communicator, so that after a fault each rank can say what it was in. Who writes them to a file, and who reads
them, is decided elsewhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from time import monotonic

SIZE = 4096
"""Events that are remembered: some hundred decode steps of a small model, some tens of a large one."""
COLLECTIVE, COMMAND = "collective", "command"
Record = tuple[float, str, str, int, int]
"""(clock, collective or command, its name, its number, bytes)."""


class Flight:
    """The ring of one communicator; used by the one thread that its collectives belong to."""

    __slots__ = ("_at", "_mask", "_ring", "beside")

    def __init__(self, size: int = SIZE) -> None:
        if size < 1 or size & (size - 1):
            raise ValueError(f"a flight recorder of {size} records; the size must be a power of two")
        self._ring: list[Record | None] = [None] * size
        self._mask = size - 1
        self._at = 0
        self.beside: Callable[[], tuple[int, list[Record]]] | None = None
        """Of what another ring holds: how many events it ever had, and those it remembers, oldest first."""

    def note(self, what: str, name: str, number: int, nbytes: int) -> float:
        """Something begins; by the clock that is returned."""
        at, now = self._at, monotonic()
        self._ring[at & self._mask] = (now, what, name, number, nbytes)
        self._at = at + 1
        return now

    @property
    def forgotten(self) -> int:
        """How many events were written over."""
        own = max(0, self._at - len(self._ring))
        if self.beside is None:
            return own
        count, remembered = self.beside()
        return own + count - len(remembered)

    def records(self) -> list[Record]:
        """Oldest first. Safe while the rank goes on: then the oldest may be missing."""
        at, ring = self._at, list(self._ring)
        ordered = ring[at & self._mask :] + ring[: at & self._mask]
        own = [record for record in ordered if record is not None]
        return own if self.beside is None else [*heapq.merge(own, self.beside()[1])]
