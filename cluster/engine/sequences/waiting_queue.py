"""The queue of sequences that wait for a slot and blocks: one static order, so nobody is overtaken for ever.

The order is arrival time plus priority times a fixed patience: a request of a worse priority is overtaken only by
what arrives within that many seconds per level after it. A preempted sequence keeps its order and so comes back ahead
of everything that arrived later.
"""

from __future__ import annotations

import heapq
from typing import Generic, Protocol, TypeVar

Order = tuple[float, int, int]
"""Who goes first: arrival shifted by priority, then the number of the submission, then the sample."""


class Ordered(Protocol):
    """What can wait."""

    order: Order


W = TypeVar("W", bound=Ordered)


class WaitingQueue(Generic[W]):
    """A heap of orders that forgets sequences which ended while they waited."""

    def __init__(self) -> None:
        self._heap: list[Order] = []
        self._waiting: dict[Order, W] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, seq: W) -> None:
        self._waiting[seq.order] = seq
        heapq.heappush(self._heap, seq.order)

    def head(self) -> W | None:
        """Who is next, without removing it."""
        while self._heap and self._heap[0] not in self._waiting:
            heapq.heappop(self._heap)
        return self._waiting[self._heap[0]] if self._heap else None

    def discard(self, seq: W) -> None:
        """The sequence no longer waits, because it starts or because it ended."""
        self._waiting.pop(seq.order, None)
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._waiting):
            self._heap = sorted(self._waiting)
