"""Callers share an engine by weight, whatever they send: their queues, and the counters that decide between them.

Within a flow arrival and priority count (waiting_queue.py). Between callers, and between the flows of one:

    who starts next   whoever holds the least (preemption.py); of equals the one that was served the least
    served            a virtual counter of tokens, new ones dearer than read ones, by weight; whoever begins to wait
                      joins at the counter of the last that started, so that nobody saves up by being idle
                      (Sheng et al., Fairness in Serving Large Language Models, 2024)
    burst             prompt tokens: a second's rest is worth a whole step, after that each gets its part

Functions of what rank 0 has seen; no other rank knows of callers, and no bit of an answer depends on them.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from cluster.engine.request import Share
from cluster.engine.schedule.preemption import CallerUsage
from cluster.engine.sequences.caller_flows import Caller, Flow
from cluster.engine.sequences.sequence import Sequence
from cluster.engine.sequences.waiting_queue import Order

NEW_COST = 2.0
"""What a new token counts for beside one that is read."""
RECENT_SECONDS = 10.0
"""How long after another's last request an engine reckons with its return."""
MAX_REMEMBERED = 1024
"""Flows without a request whose counters are kept."""


class FairQueue:
    """Every flow's queue and counters. `max_burst`: prompt tokens of one step."""

    def __init__(self, max_burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_burst, self._clock = float(max_burst), clock
        self._callers: dict[str, Caller] = {}
        self._flows: dict[tuple[str, str], Flow[Sequence]] = {}  # with requests
        self._idle: OrderedDict[tuple[str, str], Flow[Sequence]] = OrderedDict()  # who left last stands last
        self._waiting: dict[Flow[Sequence], None] = {}
        self._turn = 0.0  # `Caller.served` of the caller that started last
        self._num_waiting = 0

    def __len__(self) -> int:
        """Sequences that wait."""
        return self._num_waiting

    @property
    def several(self) -> bool:
        """Whether more than one flow has requests."""
        return len(self._flows) > 1

    @property
    def lately_several(self) -> bool:
        """Whether another flow may come back at any moment."""
        if self.several or not self._idle:
            return self.several
        return self._clock() - next(reversed(self._idle.values())).left < RECENT_SECONDS

    def join(self, share: Share) -> Flow[Sequence]:
        """One more request of a caller."""
        key = (share.caller, share.part)
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = self._idle.pop(key) if key in self._idle else self._new(key)
            flow.caller.live += 1
            flow.burst = min(self._max_burst, flow.burst + (self._clock() - flow.left) * self._max_burst)
        flow.caller.weight = share.weight
        flow.live += 1
        return flow

    def _new(self, key: tuple[str, str]) -> Flow[Sequence]:
        caller = self._callers.setdefault(key[0], Caller(key[0]))
        caller.known += 1
        return Flow(caller, key[1], self._max_burst)

    def leave(self, flow: Flow[Sequence]) -> None:
        """One of its requests has ended."""
        flow.live -= 1
        if flow.live:
            return
        key = (flow.caller.name, flow.part)
        self._idle[key] = self._flows.pop(key)
        flow.caller.live -= 1
        flow.left, flow.rows, flow.passed = self._clock(), 0.0, 0
        if len(self._idle) > MAX_REMEMBERED:
            self._forget(*self._idle.popitem(last=False))

    def _forget(self, key: tuple[str, str], flow: Flow[Sequence]) -> None:
        flow.caller.known -= 1
        if not flow.caller.known:
            del self._callers[key[0]]

    # ------------------------------------------------------------ who waits

    def push(self, seq: Sequence) -> None:
        flow, caller = seq.flow, seq.flow.caller
        if not len(flow.queue):
            self._waiting[flow] = None
            flow.served = max(flow.served, caller.turn)
            if not caller.waiting:
                caller.served = max(caller.served, self._turn)
        before = len(flow.queue)
        flow.queue.push(seq)
        self._count(flow, len(flow.queue) - before)

    def discard(self, seq: Sequence) -> None:
        """The sequence no longer waits, because it starts or because it ended."""
        flow, before = seq.flow, len(seq.flow.queue)
        flow.queue.discard(seq)
        self._count(flow, len(flow.queue) - before)
        if not len(flow.queue):
            self._waiting.pop(flow, None)

    def start(self, seq: Sequence) -> None:
        """It waits no longer: it was given a slot and blocks."""
        flow, caller = seq.flow, seq.flow.caller
        self.discard(seq)
        flow.passed = 0
        caller.turn, self._turn = max(caller.turn, flow.served), max(self._turn, caller.served)
        seq.earned = seq.computed - seq.target  # what it has to read first is nothing gained

    def first(self, holdings: Callable[[], CallerUsage]) -> list[Flow[Sequence]]:
        """The flows in which something waits, in the order in which they may start."""
        if len(self._waiting) < 2:
            return list(self._waiting)
        now = holdings()

        def rank(flow: Flow[Sequence]) -> tuple[float, float, float, float, Order]:
            head, caller = flow.queue.head(), flow.caller
            assert head is not None, "a flow that waits has a first sequence"
            return (now.of(caller), caller.served, now.of(flow), flow.served, head.order)

        return sorted(self._waiting, key=rank)

    def _count(self, flow: Flow[Sequence], more: int) -> None:
        self._num_waiting += more
        flow.caller.waiting += more

    # ------------------------------------------------------------ who was served

    def charge(self, seq: Sequence, start: int, stop: int) -> None:
        """A sequence's tokens `start` to `stop` were computed; what is computed again costs nothing."""
        seq.earned += stop - start
        count = stop - max(start, seq.charged)
        if count > 0:
            seq.charged = stop
            cost = count * (NEW_COST if start >= seq.prompt_len else 1.0)
            seq.flow.served += cost
            seq.flow.caller.served += cost / seq.flow.caller.weight

    def refill(self, tokens: int, reading: set[Flow[Sequence]]) -> None:
        """A step's prompt tokens, divided over the flows that have something to read."""
        weights = sum(flow.weight for flow in reading)
        for flow in reading:
            flow.burst = min(self._max_burst, flow.burst + tokens * flow.weight / weights)

    def waiting(self) -> list[Flow[Sequence]]:
        """The flows in which something waits."""
        return list(self._waiting)
