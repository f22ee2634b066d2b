"""The serving program on real ranks takes training steps over gRPC while it generates."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cluster.actors.group import WorkerGroup
from cluster.actors.spec import ParallelConfig, ServeSpec, TrainingConfig
from cluster.engine.config import EngineConfig
from cluster.frontend.frontend import Frontend
from cluster.frontend.socket_link import SocketLink
from cluster.rpc.client import AsyncClient
from cluster.rpc.server import build_server
from parallel.native import library
from tests.cluster.engine.tiny_models import save_tiny

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
KEY = b"0123456789abcdef"
DOCUMENTS = [[5, 9, 2, 7, 11, 3, 8], [1, 4, 4, 6, 90]]


async def train_under_load(address: tuple[str, int]) -> None:
    frontend = Frontend(SocketLink(address, KEY))
    frontend.start()
    server = build_server(frontend, "127.0.0.1:0")
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            await steps_beside_streams(client)
    finally:
        await server.stop(1.0)
        await frontend.close()


async def steps_beside_streams(client: AsyncClient) -> None:
    fields: dict[str, Any] = {"stopping": {"max_new_tokens": 100, "ignore_eos": True}}
    running = asyncio.create_task(client.generate([[i, 3, 5] for i in range(8)], **fields))
    for step in range(10):
        taken = await client.train_step(DOCUMENTS, expected_step=step, optimizer={"learning_rate": 1e-3})
        assert taken.weight_version == step + 1
    assert all(len(result.samples[0].token_ids) == 100 for result in (await running).results)
    scores = (await client.score(DOCUMENTS)).results
    trained = (await client.evaluate(DOCUMENTS)).logprobs
    assert [list(score.logprobs) for score in scores] == [list(sequence.values) for sequence in trained]
    assert {score.weight_version for score in scores} == {10}


def test_two_ranks_train_and_generate_behind_one_port(tmp_path: Path) -> None:
    library.available()
    folder = save_tiny("gpt_neox", tmp_path / "neox")
    config = EngineConfig(kv_blocks=96, max_sequences=8)
    spec = ServeSpec(model=str(folder), authkey=KEY, parallel=ParallelConfig(tp=2), engine=config)
    group = WorkerGroup(spec, size=2)
    try:
        address = group.start()[0].facts.engine_address
        assert address is not None
        asyncio.run(asyncio.wait_for(train_under_load(address), 60))
    finally:
        group.close()
