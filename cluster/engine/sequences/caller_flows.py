"""Who asks: callers, and the flows of requests in which each of them asks. Counters only; fair_share.py moves them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic

from cluster.engine.sequences.waiting_queue import W, WaitingQueue


@dataclass(eq=False)
class Caller:
    """A name, or an address of callers without one."""

    name: str
    weight: float = 1.0
    served: float = 0.0  # tokens by cost and weight
    turn: float = 0.0  # `Flow.served` of its flow that started last
    known: int = 0  # flows
    live: int = 0  # of these, with requests
    waiting: int = 0  # sequences


@dataclass(eq=False)
class Flow(Generic[W]):
    """The requests of one caller; of an address, those of one of its connections."""

    caller: Caller
    part: str
    burst: float  # prompt tokens that it may have computed now, where several share
    served: float = 0.0
    live: int = 0  # requests that have not ended
    rows: float = 0.0  # of the decoding rows it was due: what it has not used yet
    passed: int = 0  # how many of others started while its first one did not fit
    left: float = 0.0  # when its last request ended
    queue: WaitingQueue[W] = field(default_factory=WaitingQueue)

    @property
    def weight(self) -> float:
        """Of all service: its caller's, divided by the flows that this has now."""
        return self.caller.weight / max(1, self.caller.live)
