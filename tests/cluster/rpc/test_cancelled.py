"""Calls that are cancelled, clients that go, a server that stops: at every moment, and not one traceback in the log."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.rpc.client.client import AsyncClient, ServiceError
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.frontend.fakes import ENDLESS, LASTING, FakeEngine
from tests.cluster.frontend.harness import run, until
from tests.cluster.rpc.harness import service
from tests.cluster.rpc.services.training_service import DOCUMENTS, STEP, training_service

LONG_TEXT = "abc " * 5_000
MOMENTS = [0.0, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.05]
"""Seconds after which a call is cancelled: before it was sent, on its way, in every part of it."""
ENDINGS = {"max_new_tokens": LASTING}
Ask = Callable[[AsyncClient], Awaitable[Any]]


class Kept(logging.Handler):
    """Every record of this process."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def odd(self) -> list[str]:
        """Those that tell of something that went wrong."""
        words = ("Traceback", "exception in callback", "was destroyed", "never retrieved", "never awaited")
        shown = [(record, record.getMessage()) for record in self.records]
        return [
            f"{record.name}: {text[:500]}"
            for record, text in shown
            if record.exc_info or record.levelno >= logging.ERROR or any(word in text for word in words)
        ]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where anything was logged with a traceback, or raised where nobody hears it."""
    unheard: list[str] = []
    for hook in (sys, "unraisablehook"), (threading, "excepthook"):
        monkeypatch.setattr(*hook, lambda what: unheard.append(repr(what)))
    root, kept = logging.getLogger(), Kept()
    level = root.level
    root.addHandler(kept)
    root.setLevel(logging.DEBUG)
    try:
        yield
        gc.collect()
    finally:
        root.removeHandler(kept)
        root.setLevel(level)
    assert kept.records, "nothing is heard here"
    assert not unheard and not kept.odd(), [*unheard, *kept.odd()]


async def stream(client: AsyncClient, prompt: Any = "abc") -> None:
    async for _ in client.stream([prompt], stopping=ENDINGS):
        pass


ASKED: dict[str, Ask] = {
    "unary": lambda client: client.generate(["abc"], stopping=ENDINGS),
    "stream": stream,
    "long text": lambda client: client.tokenize([LONG_TEXT]),
    "long prompt": lambda client: stream(client, LONG_TEXT),
    "score": lambda client: client.score([[1, 2, 3]] * 50),
}


async def cancelled(ask: Ask, client: AsyncClient, after_s: float) -> None:
    task = asyncio.ensure_future(ask(client))
    await asyncio.sleep(after_s)
    task.cancel()
    with suppress(asyncio.CancelledError, ServiceError):
        await task


async def cut_off(ask: Ask, address: str, after_s: float) -> None:
    """The client's whole connection goes."""
    client = AsyncClient(address)
    task = asyncio.ensure_future(ask(client))
    await asyncio.sleep(after_s)
    await client.close()
    with suppress(asyncio.CancelledError, ServiceError, grpc.RpcError, grpc.aio.UsageError):
        await task


@pytest.mark.parametrize("held", [False, True], ids=["running", "queueing"])
def test_a_cancelled_call_is_no_event(held: bool) -> None:
    async def main() -> None:
        async with service(FakeEngine(limits=ENDLESS, step_seconds=0.001, held=held)) as s:
            for ask in ASKED.values():
                await asyncio.gather(*(cancelled(ask, s.client, moment) for moment in MOMENTS * 2))
                await asyncio.gather(*(cut_off(ask, s.address, moment) for moment in MOMENTS))
            await until(lambda: not s.engine.live and not s.frontend.num_open)

    run(main())


def test_a_server_that_stops_ends_its_calls_without_a_word() -> None:
    async def main() -> None:
        async with service(FakeEngine(limits=ENDLESS, step_seconds=0.001)) as s:
            tasks = [asyncio.ensure_future(ask(s.client)) for ask in ASKED.values() for _ in range(4)]
            await asyncio.sleep(0.03)
            await s.server.stop(0.0)
            for task in tasks:
                with suppress(ServiceError):
                    await task

    run(main())


def test_deadlines_that_pass_are_no_event_either() -> None:
    async def main() -> None:
        async with service(FakeEngine(limits=ENDLESS, step_seconds=0.001)) as s:
            for seconds in (0.001, 0.005, 0.02):
                for ask in (s.client.generate, s.client.score):
                    with suppress(ServiceError):
                        await ask(["abc"] * 3, timeout=seconds)
                with suppress(ServiceError):
                    async for _ in s.client.stream(["abc"], stopping=ENDINGS, timeout=seconds):
                        pass

    run(main())


def test_a_training_call_that_is_cancelled_is_no_event(tmp_path: Path) -> None:
    async def main() -> None:
        async with training_service(save_tiny("gpt2", tmp_path)) as client:
            for moment in MOMENTS:
                await asyncio.gather(
                    cancelled(lambda c: c.forward_backward(DOCUMENTS), client, moment),
                    cancelled(lambda c: c.train_step(DOCUMENTS, **STEP), client, moment),
                    cancelled(lambda c: c.generate([[1, 2]], stopping={"max_new_tokens": 50}), client, moment),
                )
            assert (await client.train_state()).step >= 0

    run(main())
