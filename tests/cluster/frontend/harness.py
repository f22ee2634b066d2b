"""Front-ends over fake engines, and a link whose engine the test itself plays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from cluster.engine.request import EngineLoad, ModelLimits, Request, SamplingParams, StoppingCriteria
from cluster.frontend.frontend import Frontend
from cluster.frontend.output.output_text import TextCodec
from cluster.frontend.output.streams import Result, collect
from cluster.frontend.requests.call import Call, FrontendConfig, Prompt
from cluster.frontend.requests.quarantine import Quarantine
from cluster.link.engine_link import EventSink, FaultSink, SampleId
from cluster.link.engine_loop import EngineSurface
from cluster.link.local_link import LocalLink
from cluster.training.train_calls import TrainAnswer, TrainCall
from tests.cluster.frontend.fakes import CODEC, LIMITS

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], seconds: float = 120.0) -> T:
    """A test's coroutine, with a limit."""

    async def limited() -> T:
        return await asyncio.wait_for(main, seconds)

    return asyncio.run(limited())


@asynccontextmanager
async def serving(engine: EngineSurface, codec: TextCodec | None = CODEC, **config: Any) -> AsyncIterator[Frontend]:
    frontend = Frontend(LocalLink(engine), codec=codec, config=FrontendConfig(**config))
    frontend.start()
    try:
        yield frontend
    finally:
        await frontend.close()


def deaths_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """For engines that die again and again whatever they are asked: no request is tried for it."""
    monkeypatch.setattr(Quarantine, "died", lambda *_: None)


def call(*prompts: Sequence[int] | str, **fields: Any) -> Call:
    """A call with max_new_tokens 8 and seed 1 unless told otherwise."""
    made = tuple(Prompt(text=p) if isinstance(p, str) else Prompt(token_ids=tuple(p)) for p in prompts)
    fields.setdefault("sampling", SamplingParams(seed=1))
    fields.setdefault("stopping", StoppingCriteria(max_new_tokens=8))
    return Call(prompts=made, **fields)


async def answer(frontend: Frontend, asked: Call) -> list[Result]:
    return await collect(await frontend.open(asked), len(asked.prompts))


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for what another thread does; on a busy machine that may take a while."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.002)


class PlayedLink:
    """An EngineLink that only writes down what it is told; the test plays the engine through `events` and `fault`."""

    def __init__(self, limits: ModelLimits = LIMITS) -> None:
        self.limits = limits
        self.submitted: list[Request] = []
        self.aborted: list[str] = []
        self.aborted_samples: list[SampleId] = []
        self.closed = False
        self.answer = EngineLoad()
        self.events: EventSink
        self.fault: FaultSink

    def start(self, events: EventSink, fault: FaultSink) -> None:
        self.events, self.fault = events, fault

    def submit(self, requests: Sequence[Request]) -> None:
        self.submitted += requests

    def abort(self, request_ids: Sequence[str], samples: Sequence[SampleId] = ()) -> None:
        self.aborted += request_ids
        self.aborted_samples += samples

    def train(self, call: TrainCall) -> Future[TrainAnswer]:
        return Future()

    def load(self, timeout: float = 5.0, prove: bool = False) -> EngineLoad:
        return self.answer

    def close(self, timeout: float = 10.0) -> None:
        self.closed = True
