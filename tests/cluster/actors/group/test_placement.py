"""What a group says of a cluster that cannot hold it, and how it numbers the ranks on the nodes it was given."""

from __future__ import annotations

from urllib.parse import urlparse

import pytest

from cluster.actors.group.placement import (
    PlacementConfig,
    assign,
    bundles_in_rank_order,
    check_room,
    meeting_point,
    split_replicas,
)
from parallel.errors import ConfigError


def node(cpus: int = 0, gpus: int = 0, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus}}


def test_a_shortage_names_what_is_needed_and_what_every_node_has() -> None:
    rule = r"4 ranks need 4 GPUs on one node, the cluster has 2 \+ 2; .*at most 2.*PACK"
    with pytest.raises(ConfigError, match=rule):
        check_room([node(8, 2), node(8, 2), node(8)], 4, "cuda", "STRICT_PACK")


def test_the_same_nodes_hold_the_group_when_it_may_be_spread() -> None:
    check_room([node(8, 2), node(8, 2)], 4, "cuda", "PACK")


def test_dead_nodes_do_not_count() -> None:
    with pytest.raises(ConfigError, match="need 2 CPU cores on one node, the cluster has 1;"):
        check_room([node(1), node(4, alive=False)], 2, "cpu", "STRICT_PACK")


def test_a_cluster_without_a_gpu_has_none() -> None:
    with pytest.raises(ConfigError, match="1 rank needs 1 GPU on one node, the cluster has none; add a node"):
        check_room([node(4)], 1, "cuda", "STRICT_PACK")


def test_strict_spread_wants_a_node_per_rank() -> None:
    rule = r"3 ranks need 3 CPU cores, each on a node of its own, the cluster has 8 \+ 8"
    with pytest.raises(ConfigError, match=rule):
        check_room([node(8), node(8)], 3, "cpu", "STRICT_SPREAD")


def test_local_ranks_count_up_on_each_node() -> None:
    places = assign(["a", "b", "a", "a"], "tcp://a:1")
    assert [(place.local_rank, place.local_size) for place in places] == [(0, 3), (0, 1), (1, 3), (2, 3)]
    assert str(places[1]) == "rank 1 on b"


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ConfigError, match="'PACKED' is unknown; choose one of"):
        PlacementConfig(strategy="PACKED")  # type: ignore[arg-type]


def test_neighbouring_ranks_share_a_node_however_the_bundles_were_dealt() -> None:
    dealt = ["b", "a", "b", "a", "a", "b", "a", "b"]
    order = bundles_in_rank_order(dealt)
    assert sorted(order) == list(range(8))
    assert [dealt[index] for index in order] == ["b"] * 4 + ["a"] * 4


def test_the_fullest_node_holds_the_first_ranks() -> None:
    dealt = ["a", "b", "b", "a", "b", "b"]
    assert [dealt[index] for index in bundles_in_rank_order(dealt)] == ["b"] * 4 + ["a"] * 2


def test_replicas_that_fit_their_nodes_are_not_spoken_of() -> None:
    assert split_replicas(["a"] * 8 + ["b"] * 8, 8) == []
    assert split_replicas(["a"] * 8 + ["b"] * 8, 4) == []


def test_on_uneven_nodes_the_replica_that_is_cut_in_two_is_named() -> None:
    (sentence,) = split_replicas(["a"] * 8 + ["b"] * 5 + ["c"] * 3, 8)
    assert sentence.startswith("the 8 tensor-parallel ranks 8-15 are spread over nodes (5 on b + 3 on c)")


def test_ranks_meet_at_an_address_of_either_kind() -> None:
    for host in ("10.0.0.1", "fd00::1"):
        parts = urlparse(meeting_point(host, 5000))
        assert (parts.hostname, parts.port) == (host, 5000)
