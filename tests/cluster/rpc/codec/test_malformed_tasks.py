"""Random calls to servers with heads: each is answered or refused for what it says; none is a fault."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.rpc.client.client import AsyncClient, ServiceError
from parallel.ranks.group import Group
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.services.test_classify_embed import reference
from tests.cluster.rpc.services.test_task_training import training
from tp_decoders.model.task_config import CHOICES, SEQUENCES, SPANS, TOKENS

REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "classes": (SEQUENCES, {"num_labels": 3}),
    "several": (SEQUENCES, {"num_labels": 2, "problem_type": "multi_label_classification"}),
    "number": (SEQUENCES, {"num_labels": 1}),
    "tokens": (TOKENS, {"num_labels": 3}),
    "spans": (SPANS, {}),
    "choices": (CHOICES, {}),
}
CALLS = 70


def ids(rng: random.Random) -> list[int]:
    length = rng.choice([0, 1, 2, 3, 5, 30, 64, 65])
    return [rng.randrange(97) if rng.random() < 0.99 else rng.choice([97, 5000, 2**31]) for _ in range(length)]


def sequence(rng: random.Random) -> dict[str, Any]:
    """Labels that may be right for some head, mostly wrong for this one."""
    made: dict[str, Any] = {"token_ids": ids(rng)}
    count = rng.choice([0, 1, 1, 2, len(made["token_ids"])])
    if rng.random() < 0.7:
        made["labels"] = [rng.choice([-100, -3, 0, 1, 2, 3, 96, 97, 200]) for _ in range(count)]
    if rng.random() < 0.4:
        made["values"] = [rng.choice([0.0, 0.5, 1.0, -1.0, 7.0, float("nan")]) for _ in range(rng.randrange(4))]
    if rng.random() < 0.3:
        made["loss_weights"] = [rng.choice([0.0, 1.0, -1.0]) for _ in range(count)]
    if rng.random() < 0.4:
        made["chosen"] = True
    if rng.random() < 0.2:
        made["mark"] = rng.randrange(70)
    return made


async def one_call(client: AsyncClient, rng: random.Random, step: int) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        marks = [rng.randrange(70) for _ in range(rng.randrange(4))] if rng.random() < 0.3 else []
        await client.classify(
            [ids(rng) for _ in range(rng.randrange(5))], marks=marks, num_choices=rng.choice([0, 0, 0, 1, 2, 3]),
            num_spans=rng.choice([0, 1, 2, 101]), max_answer_tokens=rng.choice([0, 1, 40, 2**32 - 1]),
        )  # fmt: skip
    elif kind == 1:
        await client.embed([ids(rng) for _ in range(rng.randrange(4))], pooling=rng.randrange(4), normalize=True)
    elif kind == 2:
        options = {"num_choices": rng.randrange(4)} if rng.random() < 0.5 else {}
        await client.evaluate([sequence(rng) for _ in range(rng.randrange(4))], loss_options=options)
    else:
        sequences = [sequence(rng) for _ in range(rng.randrange(4))]
        await client.train_step(
            sequences, expected_step=step, loss=rng.choice(["", "", "task", "cross_entropy", "dpo"])
        )


async def walk(folder: Path, task: str, seed: int) -> Counter[str]:
    rng, outcomes = random.Random(seed), Counter[str]()
    async with training(str(folder), task, Group.single()) as client:
        for _ in range(CALLS):
            step = (await client.train_state()).step
            try:
                await one_call(client, rng, step)
                outcomes["answered"] += 1
            except ServiceError as error:
                assert error.code in REFUSED, f"seed {seed}: {error}"
                outcomes["refused"] += 1
        assert len((await client.embed([[1, 2]])).results[0].values) == 48, "the server lives"
        load = await client.load()
        assert load.kv_blocks_free == load.kv_blocks_total and load.running == load.waiting == 0
    return outcomes


@pytest.mark.parametrize("name", MODELS)
def test_random_calls_are_answered_or_refused(name: str, tmp_path: Path) -> None:
    task, options = MODELS[name]
    reference(task, tmp_path, **options)
    outcomes = run(walk(tmp_path, task, seed=sum(map(ord, name))), 120)
    assert outcomes["answered"] > 3 and outcomes["refused"] > 20, outcomes
