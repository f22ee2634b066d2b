"""The `serve` process itself is killed while it streams, and started again with the same folder and port: its clients'
own retries go on, and nobody loses, doubles or changes a token."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from cluster.access.access_config import Access
from cluster.rpc.client.client import AsyncClient
from launch.commands.server_process import Server
from tests.launch.serving.test_healing import model
from tests.launch.serving.test_healing_nodes import cluster
from tests.launch.serving.test_serve import alive, wait_until_gone

__all__ = ["cluster", "model"]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
STREAMS, TOKENS, BEFORE = 5, 600, 30
STOPPING = {"max_new_tokens": TOKENS, "ignore_eos": True}
PATIENCE = 240.0
"""Of a client while the server is started again, on a machine that does anything else."""


def server_of(model: Path, state: Path, *more: str) -> Server:
    flags = ["-v", "--model", str(model), "--state-dir", str(state), "--preset", "small", "--cluster", "cpu-2"]
    settings = ["engine.kv_blocks=512", "engine.max_sequences=16", "ledger.orphan_seconds=240"]
    return Server([*flags, *settings, *more], timeout_s=PATIENCE)


def killed(server: Server) -> None:
    if server.running:
        os.kill(server.pid, signal.SIGKILL)
    server.wait(60)


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[Server]:
    """Killed at the latest when the block ends."""
    await asyncio.to_thread(server.__enter__)
    try:
        yield server
    finally:
        killed(server)


def port_of(server: Server) -> str:
    return server.address.rpartition(":")[2]


class Load:
    """Seeded streams, one whose seed the server draws, and calls of one answer, side by side."""

    def __init__(self, client: AsyncClient, name: str) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(STREAMS + 1)]
        self.drawn_id = f"{name}-drawn"
        self._client = client
        self._tasks = [asyncio.create_task(self._read(i, {"seed": i}, f"{name}-{i}")) for i in range(STREAMS)]
        self._tasks.append(asyncio.create_task(self._read(STREAMS, {}, self.drawn_id)))
        self._unary = asyncio.create_task(self._ask(f"{name}-unary"))

    async def _read(self, index: int, sampling: dict[str, Any], request_id: str) -> None:
        asked = self._client.stream([[index, 3, 5]], sampling=sampling, stopping=STOPPING, request_id=request_id)
        async for chunk in asked:
            self.tokens[index] += chunk.token_ids

    async def _ask(self, request_id: str) -> list[list[int]]:
        sampling = {"seed": 9, "n": 2}
        answer = await self._client.generate([[7], [8]], sampling=sampling, stopping=STOPPING, request_id=request_id)
        return [list(sample.token_ids) for result in answer.results for sample in result.samples]

    async def under_way(self) -> None:
        while min(map(len, self.tokens)) < BEFORE:
            await asyncio.sleep(0.005)
        assert sum(not task.done() for task in (*self._tasks, self._unary)) > 1, "too late to prove anything"

    async def all(self) -> list[list[int]]:
        """What is the same in every run; the drawn stream is the same as a second question under its name."""
        await asyncio.gather(*self._tasks)
        again = await self._client.generate([[STREAMS, 3, 5]], stopping=STOPPING, request_id=self.drawn_id)
        assert list(again.results[0].samples[0].token_ids) == self.tokens[-1] and len(self.tokens[-1]) == TOKENS
        return [*self.tokens[:-1], *await self._unary]


async def pids_of(client: AsyncClient) -> list[int]:
    return [report.pid for report in (await client.load(60)).ranks]


def test_a_server_that_is_killed_and_started_again_goes_on_from_its_ledger(model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            running(server_of(model, tmp_path / "state")) as first,
            AsyncClient(first.address, retry_seconds=PATIENCE) as client,
        ):
            undisturbed = await Load(client, "undisturbed").all()
            load = Load(client, "killed")
            await load.under_way()
            killed(first)
            async with running(server_of(model, tmp_path / "state", "--port", port_of(first))) as second:
                assert await load.all() == undisturbed
                computed = (await client.load(60)).generated_tokens
                assert await Load(client, "undisturbed").all() == undisturbed, "answered before the kill"
                assert (await client.load(60)).generated_tokens == computed, "from the ledger"
                assert await asyncio.to_thread(second.stop) == 0

    asyncio.run(asyncio.wait_for(main(), 900))


def test_ranks_of_a_standing_cluster_outlive_the_server(cluster: Cluster, model: Path, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    cluster.wait_for_nodes()
    tokens = {name: f"the-token-of-{name}-0123456789" for name in ("alice", "bob")}
    grants = "".join(f'[{name}]\ntoken = "{token}"\nroles = ["generate"]\n' for name, token in tokens.items())
    for name, text in {**tokens, "grants": grants}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    options = [
        "ray.num_cpus=null", "placement.strategy=STRICT_SPREAD", "--ray-address", cluster.address,
        "--token-file", str(tmp_path / "grants"),
    ]  # fmt: skip
    pids: list[int] = []

    async def main() -> None:
        alice, bob = (Access(token_file=str(tmp_path / name)) for name in ("alice", "bob"))
        async with (
            running(server_of(model, tmp_path / "state", *options)) as first,
            AsyncClient(first.address, alice, retry_seconds=PATIENCE) as client,
            AsyncClient(first.address, bob, retry_seconds=PATIENCE) as other,
        ):
            undisturbed = await Load(client, "undisturbed").all()
            pids.extend(await pids_of(client))
            load = Load(client, "killed")
            await load.under_way()
            killed(first)
            again = [*options, "--port", port_of(first)]
            async with running(server_of(model, tmp_path / "state", *again)) as second:
                assert "were taken over: nothing was loaded" in second.said, second.said[-3000:]
                assert await load.all() == undisturbed
                assert await pids_of(client) == pids and len(set(pids)) == 2
                drawn = await other.generate([[1]], stopping={"max_new_tokens": 4}, request_id="killed-0", timeout=240)
                assert len(drawn.results[0].samples[0].token_ids) == 4, "another's id is nobody's business"

    asyncio.run(asyncio.wait_for(main(), 900))
    with server_of(model, tmp_path / "state", *options) as third:  # the same ranks once more, ended in order
        assert "were taken over" in third.said
    assert wait_until_gone(set(pids)), alive(set(pids))
