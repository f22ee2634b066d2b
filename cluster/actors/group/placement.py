"""Where ranks go: what a group asks of a Ray cluster, and what to say when the cluster cannot give it.

Only values and arithmetic over `ray.nodes()`'s answer, so it is tested without Ray; `cluster.actors.group.worker_group`
does the asking.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from parallel.errors import ConfigError
from parallel.options import check_above_zero

Strategy = Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]
LOOPBACK = "127.0.0.1"
STRATEGIES: tuple[Strategy, ...] = ("STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD")


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """How a group is placed and how long each part of its life may take."""

    strategy: Strategy = "STRICT_PACK"  # every rank on one node: tensor-parallel sums are latency-bound
    join_timeout_s: float = 0.0  # for nodes on their way: `ray up` returns when the head is up, before its workers
    place_timeout_s: float = 60.0  # for Ray to reserve the ranks' places
    start_timeout_s: float = 600.0  # for ranks to load
    stop_timeout_s: float = 10.0  # for ranks to end by themselves
    silence_s: float = 6.0  # a rank that has not answered for this long is lost: frozen, or behind a dead link
    max_restarts: int = 5  # of a group, within restart_window_s; 0: the first fault ends it
    restart_window_s: float = 600.0  # within which max_restarts counts
    orphan_timeout_s: float = 300.0  # ranks that outlive their server (server.state_dir) end after so long without one
    weights_cache: str | None = None  # a folder on a disk of each node, for a copy of the checkpoint's files
    log_level: int = logging.WARNING  # of the ranks: 10 debug, 20 info, 30 warning
    log_json: bool = False  # the ranks' log as lines of JSON

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"placement strategy {self.strategy!r} is unknown; choose one of {list(STRATEGIES)}")
        check_above_zero("placement", self, ("place_timeout_s", "start_timeout_s", "stop_timeout_s"))
        if not self.join_timeout_s >= 0:
            raise ConfigError(f"placement.join_timeout_s is {self.join_timeout_s:g}; give seconds, 0 or more")
        if self.silence_s < 2.0:
            raise ConfigError(
                f"placement.silence_s is {self.silence_s:g}; give at least 2 seconds: a rank answers once a second"
            )
        if self.max_restarts < 0:
            raise ConfigError(f"placement.max_restarts is {self.max_restarts}; give 0 (never) or more")
        if self.weights_cache is not None and not self.weights_cache.startswith("/"):
            raise ConfigError(
                f"placement.weights_cache is {self.weights_cache!r}; give a full path: it is each node's own"
            )
        if not self.orphan_timeout_s >= 1.0:
            raise ConfigError(f"placement.orphan_timeout_s is {self.orphan_timeout_s:g}; give at least 1 second")
        if not self.restart_window_s > 0:
            raise ConfigError(f"placement.restart_window_s is {self.restart_window_s:g}; give seconds above 0")


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank's place: who it is, where it runs, which neighbours share its host, where the ranks meet."""

    rank: int
    world: int
    node: str  # the node's address
    local_rank: int = 0
    local_size: int = 1
    address: str | None = None  # tcp://HOST:PORT of rank 0
    life: int = 0  # how often the group was rebuilt before
    key: bytes = field(default=b"", repr=False)  # which the ranks prove to each other when they meet
    listen: str | None = None  # the address that rank 0's engine listens on; None: the node's

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}"


Share = Callable[[Sequence[Place], threading.Event], list[Place]]
"""Tells ranks their share of nodes that others work on, too; does not wait once the event is set."""


def meeting_point(host: str, port: int) -> str:
    """Where ranks meet; brackets around an IPv6 address (RFC 3986)."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def bundle(device: str) -> dict[str, float]:
    """What one rank reserves: a GPU, or a CPU core."""
    return {"GPU": 1, "CPU": 1} if device == "cuda" else {"CPU": 1}


def check_room(nodes: Sequence[Mapping[str, Any]], size: int, device: str, strategy: Strategy) -> None:
    """Refuses at once what no amount of waiting would place, with the numbers."""
    resource, word = ("GPU", "GPU") if device == "cuda" else ("CPU", "CPU core")
    counts = sorted((int(node["Resources"].get(resource, 0)) for node in nodes if node["Alive"]), reverse=True)
    room = {
        "STRICT_PACK": max(counts, default=0),
        "STRICT_SPREAD": sum(1 for count in counts if count),
    }.get(strategy, sum(counts))
    if room >= size:
        return
    where = {"STRICT_PACK": " on one node", "STRICT_SPREAD": ", each on a node of its own"}.get(strategy, "")
    has = " + ".join(str(count) for count in counts if count) or "none"
    advice = f"set parallel.tp to at most {room}" if room else f"add a node with a {word} or choose another device"
    if strategy == "STRICT_PACK" and sum(counts) >= size:
        advice += ", or placement.strategy to PACK to use several nodes"
    elif device == "cpu" and room:
        advice += ", or ray.oversubscribe=true (serve: --oversubscribe) for ranks that share cores"
    needs = f"{size} ranks need {size} {word}s" if size > 1 else f"1 rank needs 1 {word}"
    raise ConfigError(f"{needs}{where}, the cluster has {has}; {advice}")


def check_replicas(nodes: Sequence[Mapping[str, Any]], replicas: int, tp: int, device: str, strategy: Strategy) -> None:
    """Refuses at once more replicas of `tp` ranks than there is room for, with the number that fits."""
    check_room(nodes, tp, device, strategy)
    resource, word = ("GPU", "GPU") if device == "cuda" else ("CPU", "CPU core")
    counts = [int(node["Resources"].get(resource, 0)) for node in nodes if node["Alive"]]
    fit = _replicas_that_fit(counts, replicas, tp, strategy)
    if fit >= replicas:
        return
    where = {"STRICT_PACK": ", each on one node", "STRICT_SPREAD": ", no two ranks of one on the same node"}
    ranks = "1 rank" if tp == 1 else f"{tp} ranks"
    has = " + ".join(str(count) for count in sorted(counts, reverse=True) if count)
    raise ConfigError(
        f"{replicas} replicas of {ranks} need {replicas * tp} {word}s{where.get(strategy, '') if tp > 1 else ''}; the "
        f"cluster has {has}, which is room for {fit}: set parallel.dp to at most {fit}, or add nodes"
    )


def _replicas_that_fit(counts: Sequence[int], most: int, tp: int, strategy: Strategy) -> int:
    if strategy == "STRICT_PACK":
        return sum(count // tp for count in counts)
    if strategy == "STRICT_SPREAD":  # a replica takes at most one of a node
        return max(n for n in range(most + 1) if sum(min(count, n) for count in counts) >= n * tp)
    return sum(counts) // tp


def bundles_in_rank_order(node_of_bundle: Sequence[str]) -> list[int]:
    """Which bundle each rank takes: node after node, the fullest first, so that neighbouring ranks, which share a
    tensor-parallel group, share a node wherever that can be; Ray promises no order.
    """
    first = {node: index for index, node in reversed(list(enumerate(node_of_bundle)))}
    return sorted(
        range(len(node_of_bundle)),
        key=lambda index: (-node_of_bundle.count(node_of_bundle[index]), first[node_of_bundle[index]], index),
    )


def split_replicas(node_of_rank: Sequence[str], tp: int) -> list[str]:
    """A sentence for each tensor-parallel group that has ranks on several nodes."""
    sentences = []
    for first in range(0, len(node_of_rank), tp):
        nodes = node_of_rank[first : first + tp]
        if len(set(nodes)) > 1:
            spread = " + ".join(f"{nodes.count(node)} on {node}" for node in dict.fromkeys(nodes))
            sentences.append(
                f"the {tp} tensor-parallel ranks {first}-{first + tp - 1} are spread over nodes ({spread}): the sums "
                f"of every layer cross the network; where that is not meant, use nodes with a multiple of {tp} ranks "
                "each, or lower parallel.tp"
            )
    return sentences


def assign(
    node_of_rank: Sequence[str], address: str | None, life: int = 0, key: bytes = b"", listen: str | None = None
) -> list[Place]:
    """The ranks' places from the node each was put on: local ranks count up in rank order."""
    seen: dict[str, int] = {}
    places = []
    for rank, node in enumerate(node_of_rank):
        local_rank = seen.get(node, 0)
        seen[node] = local_rank + 1
        places.append(
            Place(
                rank=rank,
                world=len(node_of_rank),
                node=node,
                local_rank=local_rank,
                local_size=node_of_rank.count(node),
                address=address,
                life=life,
                key=key,
                listen=listen,
            )
        )
    return places
