"""A node is lost under the real command: it waits for another one, says so, and goes on when that joins. The nodes are
raylets of one machine, each with one core."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from cluster.rpc.client.client import AsyncClient
from launch.commands.server_process import Server
from tests.cluster.frontend.harness import until
from tests.launch.serving.test_healing import LATE, Streams, ended_in_time, model, process_of, server_of, told
from tests.launch.serving.test_serve import alive, wait_until_gone

__all__ = ["model"]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
CHECKS = {
    "health_check_initial_delay_ms": 2000, "health_check_period_ms": 1000, "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}  # fmt: skip
"""As docs/serving.md has them."""
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


def started(attempts: int = 3) -> Cluster:
    """A head. Ray gives its own start half a minute, which a busy machine does not always keep to."""
    head = {"include_dashboard": False, "_system_config": CHECKS, **NODE}
    for left in reversed(range(attempts)):
        try:
            return Cluster(initialize_head=True, head_node_args=head)
        except Exception as error:
            if "timed out during startup" not in str(error) or not left:
                raise
    raise AssertionError("the last attempt returns or raises")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    nodes = started()
    try:
        yield nodes
    finally:
        nodes.shutdown()


def lost_ranks(server: Server, before: list[int]) -> list[int]:
    return [rank for rank in (0, 1) if process_of(server, rank) != before[rank]]


def test_a_lost_node_is_waited_for_and_streams_go_on_when_one_joins(cluster: Cluster, model: Path) -> None:
    lost = cluster.add_node(**NODE)
    cluster.wait_for_nodes()

    async def main() -> None:
        async with AsyncClient(server.address) as client:
            undisturbed = await Streams(client).all()
            streams = Streams(client)
            await streams.under_way()
            ranks = [process_of(server, rank) for rank in (0, 1)]
            cluster.remove_node(lost, allow_graceful=False)
            await told(server, "waiting for room: a node was lost, and no other one has room for its ranks", 1)
            assert "RECOVERING" in str(info := await client.server_info()) and "waiting for room" in info.fault
            hurried = client.generate([[1]], stopping={"max_new_tokens": 1}, timeout=1.0)
            assert await ended_in_time(asyncio.create_task(hurried)) in LATE
            cluster.add_node(**NODE)
            assert await streams.all() == undisturbed
            await until(lambda: len(lost_ranks(server, ranks)) > 0)
            assert len(lost_ranks(server, ranks)) == 1, "the survivor went on"

    options = ["ray.num_cpus=null", "placement.strategy=STRICT_SPREAD", "--ray-address", cluster.address]
    with server_of(model, *options) as server:
        asyncio.run(asyncio.wait_for(main(), 500))
    # Ray has been told to end them when the command does; the nodes, which go on, take a moment
    ranks = {process_of(server, rank) for rank in (0, 1)}
    assert wait_until_gone(ranks), alive(ranks)
