"""Several groups side by side on one cluster: whether there is room for all, and each rank's share of its node.

Ranks of other replicas on the same node count as neighbours: cores are claimed without overlap and memory is divided
by all. Shares are dealt when a group meets; one that comes back on another node after a fault may share cores there
with ranks that were there before, until these start anew, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import ray

from cluster.actors.group.placement import Place, PlacementConfig, check_replicas
from cluster.actors.group.placement_group import PROBE_EVERY_S
from parallel.errors import ConfigError


class ResourceShares:
    """Which node each rank of each replica is on. From any thread."""

    def __init__(self, num_replicas: int) -> None:
        self._nodes: dict[int, list[str]] = {}
        self._num_replicas = num_replicas
        self._came = threading.Condition()

    def share(self, replica: int, places: Sequence[Place], closing: threading.Event) -> list[Place]:
        """The places with their local rank and size among all ranks of their node; waits until every replica has been
        placed once."""
        with self._came:
            self._nodes[replica] = [place.node for place in places]
            self._came.notify_all()
            while len(self._nodes) < self._num_replicas and not closing.is_set():
                self._came.wait(PROBE_EVERY_S)
            return [self._among_all(replica, place) for place in places]

    def _among_all(self, replica: int, place: Place) -> Place:
        before = sum(nodes.count(place.node) for other, nodes in self._nodes.items() if other < replica)
        size = sum(nodes.count(place.node) for nodes in self._nodes.values())
        return replace(place, local_rank=before + place.local_rank, local_size=size)


def await_room(
    replicas: int, tp: int, device: str, config: PlacementConfig, closing: threading.Event | None = None
) -> None:
    """Until the cluster is large enough for all replicas, if its nodes are given time to join; else says what is
    missing."""
    deadline, closing = time.monotonic() + config.join_timeout_s, closing or threading.Event()
    while True:
        try:
            return check_replicas(ray.nodes(), replicas, tp, device, config.strategy)
        except ConfigError:
            if time.monotonic() >= deadline or closing.wait(PROBE_EVERY_S):
                raise
