"""Ranks of several groups on the same nodes: no core belongs to two, and what does not fit is said with what does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.actors.group.placement import Place, assign, check_replicas
from cluster.actors.group.resource_shares import ResourceShares
from cluster.actors.host.cpu_affinity import share
from parallel.errors import ConfigError

OPEN = threading.Event()


def node(cpus: int = 0, gpus: int = 0) -> dict[str, object]:
    return {"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}}


def seated(roster: ResourceShares, nodes: list[list[str]]) -> list[list[Place]]:
    """All replicas at once, as they start."""
    with ThreadPoolExecutor(len(nodes)) as pool:
        calls = [pool.submit(roster.share, i, assign(where, None), OPEN) for i, where in enumerate(nodes)]
        return [call.result(60) for call in calls]


def test_ranks_of_all_replicas_divide_a_nodes_cores() -> None:
    replicas = seated(ResourceShares(3), [["a", "a"], ["a", "b"], ["b", "b"]])
    claimed: dict[str, list[int]] = {"a": [], "b": []}
    for place in (place for places in replicas for place in places):
        assert place.local_size == 3
        claimed[place.node] += share(range(9), place.local_rank, place.local_size)
    assert {where: sorted(cores) for where, cores in claimed.items()} == {"a": list(range(9)), "b": list(range(9))}


def test_one_that_comes_back_gets_the_same_share_and_on_another_node_counts_who_is_there() -> None:
    roster = ResourceShares(2)
    first, second = seated(roster, [["a"], ["a"]])
    assert roster.share(1, assign(["a"], None), OPEN) == second and second[0].local_rank == 1
    (moved,) = roster.share(0, assign(["b"], None), OPEN)
    assert (moved.local_rank, moved.local_size) == (0, 1) and first[0].local_size == 2
    assert roster.share(1, assign(["a"], None), OPEN)[0].local_size == 1


def test_nobody_waits_for_a_replica_that_will_not_come() -> None:
    closing = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ResourceShares(2).share, 0, assign(["a"], None), closing)
        assert not waiting.done()
        closing.set()
        assert waiting.result(60)[0].local_size == 1


@pytest.mark.parametrize(
    ("nodes", "replicas", "tp", "device", "strategy", "sentence"),
    [
        ([node(2)], 3, 1, "cpu", "STRICT_PACK",
         "3 replicas of 1 rank need 3 CPU cores; the cluster has 2, which is room for 2: set parallel.dp to at most 2"),
        ([node(3), node(3)], 3, 2, "cpu", "STRICT_PACK",
         "3 replicas of 2 ranks need 6 CPU cores, each on one node; the cluster has 3 \\+ 3, which is room for 2: set"),
        ([node(8, 8), node(8, 4)], 2, 8, "cuda", "PACK",
         "2 replicas of 8 ranks need 16 GPUs; the cluster has 8 \\+ 4, which is room for 1: set"),
        ([node(4), node(1), node(1)], 2, 3, "cpu", "STRICT_SPREAD",
         "need 6 CPU cores, no two ranks of one on the same node; .* room for 1: set"),
        ([node(1)], 2, 2, "cpu", "STRICT_PACK",
         "2 ranks need 2 CPU cores on one node, the cluster has 1; set parallel.tp to at most 1"),
    ],
)  # fmt: skip
def test_more_replicas_than_there_is_room_for_are_refused_with_the_number_that_fits(
    nodes: list[dict[str, object]], replicas: int, tp: int, device: str, strategy: str, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_replicas(nodes, replicas, tp, device, strategy)  # type: ignore[arg-type]


def test_replicas_that_fit_are_not_spoken_of() -> None:
    check_replicas([node(3), node(3)], 3, 2, "cpu", "PACK")
    check_replicas([node(4), node(4)], 4, 2, "cpu", "STRICT_PACK")
    check_replicas([node(2), node(2), node(2)], 2, 3, "cpu", "STRICT_SPREAD")
