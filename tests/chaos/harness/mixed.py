"""Everything a server is asked for, side by side and for as long as wanted: streams, whole answers, scores, embeddings,
clients that vanish, that read slowly, that give little time, and training steps with a state saved now and then.

Counts how calls ended. What is not among a caller's expected ends is kept with its words: `Tally.wrong`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc

from cluster.access.access_config import Access
from cluster.rpc.client.client import AsyncClient, ServiceError
from tp_decoders.protocol.inference_pb2 import FinishReason

VOCAB = 97
CALL_S = 120.0
"""Of calls that nobody hurries: one that takes longer is a wrong end."""
Call = Callable[[AsyncClient, random.Random], Awaitable[str]]


class Tally:
    """How calls ended, by kind; whether any ended in a way it should not."""

    def __init__(self) -> None:
        self.ends: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []

    def take(self, kind: str, end: str) -> None:
        self.ends[kind, end] += 1

    def table(self) -> str:
        rows = [f"| {kind} | {end} | {count} |" for (kind, end), count in sorted(self.ends.items())]
        return "\n".join(["| calls | ended | how many |", "| --- | --- | --- |", *rows])


def drawn_prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(1, VOCAB) for _ in range(rng.randint(2, 24))]


def stopping(rng: random.Random, most: int = 64) -> dict[str, object]:
    return {"max_new_tokens": rng.randint(4, most), "ignore_eos": True}


async def stream(client: AsyncClient, rng: random.Random) -> str:
    wanted, got = stopping(rng), 0
    async for chunk in client.stream([drawn_prompt(rng)], stopping=wanted, timeout=CALL_S):
        got += len(chunk.token_ids)
    return "whole" if got == wanted["max_new_tokens"] else f"{got} tokens of {wanted['max_new_tokens']}"


async def slow_reader(client: AsyncClient, rng: random.Random) -> str:
    wanted, got = stopping(rng, 40), 0
    async for chunk in client.stream([drawn_prompt(rng)], stopping=wanted, timeout=CALL_S):
        got += len(chunk.token_ids)
        await asyncio.sleep(0.2)
    return "whole" if got == wanted["max_new_tokens"] else f"{got} tokens of {wanted['max_new_tokens']}"


async def whole_answer(client: AsyncClient, rng: random.Random) -> str:
    answer = await client.generate([drawn_prompt(rng)], stopping=stopping(rng), timeout=CALL_S)
    return FinishReason.Name(answer.results[0].samples[0].finish_reason)


async def score(client: AsyncClient, rng: random.Random) -> str:
    await client.score([drawn_prompt(rng) for _ in range(3)], timeout=CALL_S)
    return "scored"


async def embed(client: AsyncClient, rng: random.Random) -> str:
    await client.embed([drawn_prompt(rng)], timeout=CALL_S)
    return "embedded"


async def vanish(client: AsyncClient, rng: random.Random) -> str:
    """Leaves in the middle of an answer, every other time with its connection."""
    left = rng.randint(1, 5)
    chunks = client.stream([drawn_prompt(rng)], stopping={"max_new_tokens": 90, "ignore_eos": True})
    async with contextlib.aclosing(chunks):
        async for _ in chunks:
            left -= 1
            if not left:
                break
    return "left"


async def hurried(client: AsyncClient, rng: random.Random) -> str:
    """With a deadline that is often too short."""
    try:
        answer = await client.generate([drawn_prompt(rng)], stopping=stopping(rng, 90), timeout=rng.uniform(0.02, 0.5))
    except ServiceError as error:
        if error.code != grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
        return "deadline"
    return FinishReason.Name(answer.results[0].samples[0].finish_reason)


CALLS: dict[str, tuple[int, float, Call]] = {
    "stream": (4, 0.1, stream), "slow reader": (2, 0.3, slow_reader), "answer": (2, 0.3, whole_answer),
    "score": (1, 0.4, score), "embed": (1, 0.4, embed), "vanishing client": (2, 0.5, vanish),
    "call with a deadline": (2, 0.4, hurried),
}  # fmt: skip
"""How many callers of each kind, and how long each rests between two calls."""
EXPECTED = {
    "stream": {"whole"}, "slow reader": {"whole"}, "answer": {"FINISH_REASON_LENGTH"}, "score": {"scored"},
    "embed": {"embedded"}, "vanishing client": {"left"},
    "call with a deadline": {"deadline", "FINISH_REASON_LENGTH", "FINISH_REASON_DEADLINE"},
}  # fmt: skip
CALLS_PER_CONNECTION = 20
STEP_REST_S, STEPS_PER_SAVE = 2.0, 20


async def caller(kind: str, number: int, address: str, access: Access, tally: Tally, until: float) -> None:
    """One caller: calls and rests, with a new connection now and then."""
    rng = random.Random(f"{kind} {number}")
    _, rest, call = CALLS[kind]
    while time.monotonic() < until:
        async with AsyncClient(address, access) as client:
            for _ in range(CALLS_PER_CONNECTION if kind != "vanishing client" else rng.randint(1, 2)):
                try:
                    end = await call(client, rng)
                except ServiceError as error:
                    end = str(error)[:200]
                tally.take(kind, end)
                if end not in EXPECTED[kind]:
                    tally.wrong.append(f"{kind}: {end}")
                await asyncio.sleep(rest * rng.uniform(0.5, 1.5))
                if time.monotonic() >= until:
                    return


async def trainer(states: Path, address: str, access: Access, tally: Tally, until: float) -> None:
    """A step every other second; now and then a state, of which the one before is removed."""
    rng = random.Random("training")
    async with AsyncClient(address, access) as client:
        step = (await client.train_state()).step
        while time.monotonic() < until:
            rows = [drawn_prompt(rng) for _ in range(2)]
            done = await client.train_step(rows, optimizer={"learning_rate": 1e-5}, expected_step=step, timeout=CALL_S)
            step = done.step
            tally.take("training step", "applied")
            if step % STEPS_PER_SAVE == 0:
                await client.save_state(f"step-{step}", timeout=CALL_S)
                tally.take("state", "saved")
                shutil.rmtree(states / f"step-{step - STEPS_PER_SAVE}", ignore_errors=True)
            await asyncio.sleep(STEP_REST_S)


async def load(address: str, access: Access, states: Path, seconds: float, tally: Tally) -> None:
    """All of it, for so long."""
    until = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        for kind, (count, _, _) in CALLS.items():
            for number in range(count):
                group.create_task(caller(kind, number, address, access, tally, until))
        group.create_task(trainer(states, address, access, tally, until))
