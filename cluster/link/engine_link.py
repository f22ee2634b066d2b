"""The seam between a front-end and the engine it talks to, wherever that runs.

`LocalLink` drives an engine in a thread of this process; `SocketLink` talks to rank 0 of a worker group over an
authenticated connection. Both are asynchronous from the front-end's side: submit returns at once, what happens comes
back as events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from msgspec import Struct

from cluster.engine.request import EngineLoad, ModelLimits, Request, TokenEvent
from cluster.training.train_calls import TrainAnswer, TrainCall
from parallel.errors import TpError


class Rejected(Struct, frozen=True, array_like=True, tag=1):
    """The engine refused a request at submission; nothing of it will run."""

    request_id: str
    error: TpError


LinkEvent = TokenEvent | Rejected
SampleId = tuple[str, int]
"""A request's id and a sample's index."""

EventSink = Callable[[Sequence[LinkEvent]], None]
"""Called from a foreign thread, once per engine step, with everything that happened in it."""
FaultSink = Callable[[str], None]
"""Called once, from a foreign thread, when the engine behind the link is gone: the message names rank, node and
cause.
"""


class EngineLink(Protocol):
    """An engine as its front-end sees it. Every call is thread-safe, returns at once, or has the stated limit."""

    @property
    def limits(self) -> ModelLimits: ...

    def start(self, events: EventSink, fault: FaultSink) -> None: ...

    def submit(self, requests: Sequence[Request]) -> None: ...

    def abort(self, request_ids: Sequence[str], samples: Sequence[SampleId] = ()) -> None:
        """End whole requests, and single samples of requests whose other samples go on; unknown ones are ignored."""
        ...

    def train(self, call: TrainCall) -> Future[TrainAnswer]:
        """Runs between two engine steps, in the order of the calls; cancelled before its turn, never."""
        ...

    def load(self, timeout: float = 5.0, prove: bool = False) -> EngineLoad:
        """The engine's counters; to `prove`, after a canary through every rank."""
        ...

    def close(self, timeout: float = 10.0) -> None: ...
