"""What a group's ranks have reserved on a Ray cluster: one bundle each, of one placement group.

Waits for room and says what is missing while it does. After a fault the bundles of surviving ranks stay as they are
(Ray itself looks for another node for a lost one). Starts no actor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors.group.detached_actors import found
from cluster.actors.group.placement import PlacementConfig, bundle, bundles_in_rank_order, check_room
from parallel.errors import ConfigError, WorkerError

Tell = Callable[[str], None]
"""Is given, in words, what is being waited for."""
PROBE_EVERY_S = 0.5


class Bundles:
    """The places of `size` ranks. Every wait ends when `closing` is set."""

    def __init__(
        self, size: int, device: str, config: PlacementConfig, closing: threading.Event, name: str | None = None
    ) -> None:
        self._size, self._device, self._config = size, device, config
        self._name = name  # they outlive this process
        self._closing = closing
        self._group: PlacementGroup | None = None
        self._of_rank: list[int] = []

    def reserve(self) -> None:
        """Reserves the ranks' resources, or says what is missing."""
        config = self._config
        self._await_large_enough()
        self._request()
        if not self._await_placed(time.monotonic() + config.place_timeout_s):
            raise WorkerError(
                f"{self._size} ranks were not placed within {config.place_timeout_s:g} s: {self._busy()}; "
                "stop other work or wait longer"
            )

    def reserve_patiently(self, tell: Tell) -> None:
        """Reserves them again after a fault: waits for nodes and resources as long as it takes."""
        while (missing := self._missing()) is not None:
            tell(f"waiting for room: {missing}")
            if self._closing.wait(PROBE_EVERY_S):
                return
        self._request()
        while not self._await_placed(time.monotonic() + self._config.place_timeout_s):
            tell(f"waiting for room: {self._busy()}")

    def await_whole(self, tell: Tell) -> None:
        """Waits until every bundle lies on a living node again; Ray moves those of a lost one."""
        while not self._whole() and not self._closing.wait(PROBE_EVERY_S):
            tell("waiting for room: a node was lost, and no other one has room for its ranks")

    def nodes(self) -> list[str]:
        """Each rank's node, by its address. Ranks keep their bundles for as long as these are reserved."""
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        nodes = [addresses[where] for _, where in sorted(self._table()["bundles_to_node_id"].items())]
        if not self._of_rank:
            self._of_rank = bundles_in_rank_order(nodes)
        return [nodes[index] for index in self._of_rank]

    def strategy(self, rank: int) -> PlacementGroupSchedulingStrategy:
        """Where Ray is to start the rank's actor; known once `nodes` was asked."""
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=self._of_rank[rank])

    @property
    def placement(self) -> str:
        assert self._group is not None, "requested"
        return str(self._group.id.hex())

    @property
    def of_rank(self) -> tuple[int, ...]:
        return tuple(self._of_rank)

    def take_over(self, placement: str, of_rank: tuple[int, ...]) -> None:
        """Those that another process reserved."""
        self._group, self._of_rank = found(placement), list(of_rank)

    def release(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)
        self._group, self._of_rank = None, []

    def _await_large_enough(self) -> None:
        """Until the cluster is large enough, if its nodes are given time to join."""
        deadline = time.monotonic() + self._config.join_timeout_s
        while True:
            try:
                return check_room(ray.nodes(), self._size, self._device, self._config.strategy)
            except ConfigError:
                if time.monotonic() >= deadline or self._closing.wait(PROBE_EVERY_S):
                    raise

    def _missing(self) -> str | None:
        try:
            check_room(ray.nodes(), self._size, self._device, self._config.strategy)
        except ConfigError as error:
            return str(error)
        return None

    def _request(self) -> None:
        outlives = {} if self._name is None else {"name": self._name, "lifetime": "detached"}
        self._group = placement_group([bundle(self._device)] * self._size, strategy=self._config.strategy, **outlives)

    def _await_placed(self, deadline: float) -> bool:
        """Whether they were placed in time, or the group is being closed."""
        assert self._group is not None, "requested"
        while not self._group.wait(PROBE_EVERY_S) and not self._closing.is_set():
            if time.monotonic() >= deadline:
                return False
        return True

    def _busy(self) -> str:
        free = ray.available_resources()
        return (
            f"the cluster is large enough but busy ({free.get('CPU', 0):g} CPU cores and {free.get('GPU', 0):g} GPUs "
            "are free)"
        )

    def _whole(self) -> bool:
        table, alive = self._table(), {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        places = table["bundles_to_node_id"]
        return table["state"] == "CREATED" and len(places) == self._size and set(places.values()) <= alive

    def _table(self) -> dict[str, Any]:
        assert self._group is not None, "bundles exist once requested"
        return placement_group_table(self._group)  # type: ignore[no-any-return]
