"""A server that trains and generates with a real model in this process, and a second engine on what it exports."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from opentelemetry.trace import Tracer

from cluster.access.access_config import Security
from cluster.engine.engine import generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, ResponseOptions
from cluster.engine.run.command_stream import Commands
from cluster.frontend.frontend import Frontend
from cluster.link.local_link import LocalLink
from cluster.rpc.client.client import AsyncClient
from cluster.rpc.server import build_server
from cluster.training.service.train_coordinator import TrainCoordinator
from cluster.training.service.train_worker import SaveConfig, TrainWorker
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from tp_decoders import load

DOCUMENTS = [[5, 9, 2, 7, 11, 3, 8], [1, 4, 4, 6, 90], [13, 2]]
STEP: dict[str, Any] = {"optimizer": {"learning_rate": 1e-3}}
CONFIG = EngineConfig(kv_blocks=96, max_sequences=16)


@asynccontextmanager
async def training_service(
    folder: Path,
    trains: bool = True,
    root: Path | None = None,
    dtype: torch.dtype | None = None,
    tracer: Tracer | None = None,
    config: EngineConfig = CONFIG,
    security: Security | None = None,
) -> AsyncIterator[AsyncClient]:
    runner = build_runner(load(folder, dtype=dtype), config, 1 << 28)
    engine = build_engine(runner, config)
    side = TrainWorker(runner, Groups(Group.single(), Group.single()), saves=SaveConfig(root=root))
    lead = TrainCoordinator(side, Commands(None), engine.weights_changed)
    frontend = Frontend(LocalLink(engine, lead if trains else None))
    frontend.start()
    server = build_server(frontend, "127.0.0.1:0", security=security, tracer=tracer)
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            yield client
    finally:
        await server.stop(1.0)
        await frontend.close()
        side.close()


def scores_of(folder: Path, sequences: list[list[int]] = DOCUMENTS) -> list[list[float]]:
    """What a fresh engine on a checkpoint, one rank, gives each token after the first."""
    runner = build_runner(load(folder), CONFIG, 1 << 28)
    response = ResponseOptions(prompt_logprobs=0)
    engine = build_engine(runner, CONFIG)
    requests = [
        Request(request_id=str(i), token_ids=tuple(ids), response=response, score_only=True)
        for i, ids in enumerate(sequences)
    ]
    return [[entry.logprob for entry in result.prompt_logprobs or ()] for (result,) in generate(engine, requests)]


async def scores(client: AsyncClient) -> list[list[float]]:
    return [list(result.logprobs) for result in (await client.score(DOCUMENTS)).results]


def logprobs(answer: Any) -> list[list[float]]:
    return [list(sequence.values) for sequence in answer.logprobs]
