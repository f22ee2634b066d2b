"""Fifty training steps while eight streams run, over a client: what was served after some of them, to be compared with
what they exported. For a server of one rank, and of several."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.rpc.client.client import AsyncClient
from tests.cluster.rpc.services.training_service import DOCUMENTS, scores, scores_of
from tp_decoders.protocol import inference_pb2 as pb

STEP: dict[str, Any] = {"optimizer": {"learning_rate": 1e-3}}
STEPS, STREAMS, TOKENS = 50, 8, 90
EXPORTED = (1, 13, STEPS)


@dataclass
class Served:
    """Scores of the documents after the exported steps, and a sample's tokens and log-probabilities after the last."""

    scores: dict[int, list[list[float]]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)


async def versions_of(client: AsyncClient, seed: int, first: asyncio.Event) -> tuple[list[int], int, int]:
    """The weight versions a stream saw, how many tokens it got, and its end."""
    seen, tokens, reason = [], 0, 0
    stopping = {"max_new_tokens": TOKENS, "ignore_eos": True}
    async for chunk in client.stream([[seed, 3, 5]], sampling={"seed": seed}, stopping=stopping):
        first.set()
        seen.append(chunk.weight_version)
        tokens += len(chunk.token_ids)
        reason = chunk.finish_reason or reason
    return seen, tokens, reason


async def always_one(client: AsyncClient, seed: int, first: asyncio.Event, done: asyncio.Event) -> list[list[int]]:
    """The versions that one stream after the other saw; all of them end whole."""
    histories = []
    while not done.is_set():
        seen, tokens, reason = await versions_of(client, seed, first)
        assert tokens == TOKENS and reason == pb.FINISH_REASON_LENGTH
        histories.append(seen)
    return histories


async def take_steps(client: AsyncClient, served: Served) -> None:
    steps = []
    for step in range(STEPS):
        steps.append(await client.train_step(DOCUMENTS, expected_step=step, **STEP))
        if step + 1 in EXPORTED:
            exported = await client.export(f"after-{step + 1}")
            assert exported.weight_version == exported.step == step + 1 and exported.bytes > 1000
            served.scores[step + 1] = await scores(client)
    assert [step.step for step in steps] == [step.weight_version for step in steps] == list(range(1, STEPS + 1))
    assert steps[-1].loss < 0.8 * steps[0].loss and all(step.grad_norm > 0 for step in steps)


async def fifty_steps_beside_eight_streams(client: AsyncClient) -> Served:
    """No stream fails, versions rise within them, and the last one holds for what comes after."""
    started, done, served = [asyncio.Event() for _ in range(STREAMS)], asyncio.Event(), Served()
    streams = [asyncio.create_task(always_one(client, seed, started[seed], done)) for seed in range(STREAMS)]
    await asyncio.gather(*(event.wait() for event in started))
    await take_steps(client, served)
    done.set()
    histories = [seen for stream in await asyncio.gather(*streams) for seen in stream]
    assert all(seen == sorted(seen) for seen in histories)
    assert any(len(set(seen)) > 1 for seen in histories), "new weights in the middle of a stream"
    assert (await versions_of(client, 1, done))[0][-1] == STEPS
    asked: dict[str, Any] = {"stopping": {"max_new_tokens": 12}, "response": {"logprobs": 0}}
    sample = (await client.generate([DOCUMENTS[0]], **asked)).results[0].samples[0]
    assert sample.weight_version == STEPS
    served.tokens, served.drawn = [*DOCUMENTS[0], *sample.token_ids], list(sample.logprobs)
    return served


def check_exports(served: Served, root: Path) -> None:
    """A fresh engine of one rank on each export gives what was served, bit for bit."""
    for step in EXPORTED:
        assert scores_of(root / f"after-{step}") == served.scores[step], f"after step {step}"
    last = scores_of(root / f"after-{STEPS}", [served.tokens])[0]
    assert last[len(DOCUMENTS[0]) - 1 :] == served.drawn
    assert served.scores[1] != served.scores[13] != served.scores[STEPS]
