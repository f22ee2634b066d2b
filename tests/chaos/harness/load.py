"""What clients do meanwhile: sixteen streams, whole answers, and calls with little time, all with known tokens.

A stream that ends is followed by another one. Whatever a client gets that it should not (a token lost, doubled or
changed, a call without an answer, an error) is a `Violation`, kept with its words. Strikes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.rpc.client.client import AsyncClient, ServiceError
from tp_decoders.protocol.inference_pb2 import FinishReason

STREAMS = 16
PROMPTS = 20
ANSWER_TOKENS = 40
PATIENCE_S = 240.0
"""Nobody's call takes longer: one that does is a call without an answer."""
GRACE_S = 10.0
"""After a deadline, for the way back of its status from a machine this busy."""
LATE = ("DEADLINE_EXCEEDED", "FINISH_REASON_DEADLINE")


def prompt(index: int) -> list[int]:
    return [index + 1, 3, 5]


def wanted(count: int) -> dict[str, Any]:
    return {"max_new_tokens": count, "ignore_eos": True}


def compare(got: Sequence[int], whole: Sequence[int]) -> str:
    """What is wrong with the tokens, in a word; nothing: the empty one."""
    if list(got) == list(whole):
        return ""
    at = next((i for i, (a, b) in enumerate(zip(got, whole, strict=False)) if a != b), min(len(got), len(whole)))
    if at == len(got):
        return f"lost: {len(got)} tokens of {len(whole)}"
    rest, known = list(got[at:]), list(whole)
    if rest[: len(known) - at] and len(got) > len(whole):
        return f"doubled: {len(got)} tokens instead of {len(whole)}, from token {at} on"
    return f"changed: token {at} is {got[at]}, not {whole[at]}"


@dataclass
class Load:
    """Everything the clients do, from `start` to `stop`."""

    address: str
    tokens: int
    known: dict[int, list[int]] = field(default_factory=dict)
    heard: list[float] = field(default_factory=lambda: [0.0] * STREAMS)
    violations: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    total_tokens: int = 0
    not_serving: list[float] = field(default_factory=list)  # when health said so, or could not be asked
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def learn(self) -> None:
        """The tokens of an undisturbed run, which all that follows is compared with."""
        async with AsyncClient(self.address, retry_seconds=PATIENCE_S) as client:

            async def one(index: int) -> None:
                self.known[index] = await self._read(client, index, None)

            await asyncio.gather(*(one(index) for index in range(PROMPTS)))
        assert all(len(tokens) == self.tokens for tokens in self.known.values()), "the undisturbed run is whole"

    def start(self) -> None:
        callers = [self._stream(slot) for slot in range(STREAMS)]
        callers += [self._answers(number) for number in range(2)] + [self._hurried()]
        self._tasks = [asyncio.create_task(caller) for caller in callers]
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Lets what is open end; nothing new is asked."""
        self._stop.set()
        await asyncio.gather(*self._tasks)
        self._watcher.cancel()

    def all_heard_since(self, when: float) -> bool:
        """Whether every stream has had a token since."""
        return min(self.heard) > when

    async def _read(self, client: AsyncClient, index: int, slot: int | None) -> list[int]:
        got: list[int] = []
        chunks = client.stream(
            [prompt(index)], sampling={"seed": index}, stopping=wanted(self.tokens), request_id=f"s-{uuid.uuid4().hex}"
        )
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                got += chunk.token_ids
                if slot is not None and chunk.token_ids:
                    self.heard[slot] = time.monotonic()
        return got

    async def _watch(self) -> None:
        """Of health, every status that a watcher is told."""
        while True:
            async with grpc.aio.insecure_channel(self.address) as channel:
                with contextlib.suppress(grpc.RpcError):
                    async for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                        if answer.status != health_pb2.HealthCheckResponse.SERVING:
                            self.not_serving.append(time.monotonic())
                self.not_serving.append(time.monotonic())
            await asyncio.sleep(0.2)

    async def _stream(self, slot: int) -> None:
        rng = random.Random(slot)
        async with AsyncClient(self.address, retry_seconds=PATIENCE_S) as client:
            while not self._stop.is_set():
                index = rng.randrange(PROMPTS)
                try:
                    async with asyncio.timeout(PATIENCE_S):
                        got = await self._read(client, index, slot)
                except (ServiceError, TimeoutError) as error:
                    self._wrong("stream", f"no answer: {error!r}"[:300])
                    await asyncio.sleep(1.0)
                    continue
                self._take("stream", compare(got, self.known[index]), len(got))

    async def _answers(self, number: int) -> None:
        rng = random.Random(100 + number)
        async with AsyncClient(self.address, retry_seconds=PATIENCE_S) as client:
            while not self._stop.is_set():
                index = rng.randrange(PROMPTS)
                try:
                    async with asyncio.timeout(PATIENCE_S):
                        got = await self._answer(client, index, None)
                except (ServiceError, TimeoutError) as error:
                    self._wrong("answer", f"no answer: {error!r}"[:300])
                else:
                    self._take("answer", compare(got[0], self.known[index][:ANSWER_TOKENS]), len(got[0]))
                await asyncio.sleep(rng.uniform(0.5, 1.5))

    async def _hurried(self) -> None:
        """With a deadline: an answer or that status, and by then."""
        rng = random.Random(200)
        async with AsyncClient(self.address, retry_seconds=PATIENCE_S) as client:
            while not self._stop.is_set():
                index, limit = rng.randrange(PROMPTS), rng.uniform(0.2, 4.0)
                began = time.monotonic()
                try:
                    got, how = await self._answer(client, index, limit)
                except ServiceError as error:
                    got, how = [], error.code.name
                    if error.code != grpc.StatusCode.DEADLINE_EXCEEDED:
                        self._wrong("call with a deadline", f"{error!r}"[:300])
                        await asyncio.sleep(1.0)
                        continue
                if (taken := time.monotonic() - began) > limit + GRACE_S:
                    self._wrong("call with a deadline", f"{limit:.1f} s were given, {taken:.1f} s taken")
                self._take("deadline heard" if how in LATE else "answer in time", self._part(got, index, how), len(got))
                await asyncio.sleep(rng.uniform(0.2, 0.8))

    def _part(self, got: Sequence[int], index: int, how: str) -> str:
        """Of an answer that its deadline may have cut short."""
        known = self.known[index][:ANSWER_TOKENS]
        return compare(got, known[: len(got)] if how in LATE else known)

    async def _answer(self, client: AsyncClient, index: int, timeout: float | None) -> tuple[list[int], str]:
        answer = await client.generate(
            [prompt(index)], sampling={"seed": index}, stopping=wanted(ANSWER_TOKENS), timeout=timeout,
            request_id=f"a-{uuid.uuid4().hex}",
        )  # fmt: skip
        sample = answer.results[0].samples[0]
        return list(sample.token_ids), FinishReason.Name(sample.finish_reason)

    def _take(self, kind: str, problem: str, tokens: int) -> None:
        self.ends[kind] += 1
        self.total_tokens += tokens
        if problem:
            self._wrong(kind, problem)

    def _wrong(self, kind: str, words: str) -> None:
        self.violations.append(f"{kind}: {words}")
