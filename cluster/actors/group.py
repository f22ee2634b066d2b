"""A group of ranks on a Ray cluster: placed, started, watched and ended together.

One actor per rank, one long-running call per actor: when a rank dies its call ends, and `ray.wait` tells within a
second. Ray carries nothing else: what the ranks do step by step travels over their own collectives. A group that
failed is closed, never repaired.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors.faults import Fault, describe, root_cause
from cluster.actors.place import Place, PlacementConfig, assign, bundle, bundles_in_rank_order, check_room
from cluster.actors.worker import MakeProgram, Ready, Worker
from parallel.errors import ConfigError, WorkerError

log = logging.getLogger(__name__)
GRACE_S = 1.0
"""After one rank fails the others' failures are awaited this long: the first to arrive is often a consequence."""
PULSE_S = 0.5


class WorkerGroup:
    """`size` ranks of one program. `start` returns when all are ready; a later failure is told once, to `on_fault`."""

    def __init__(
        self, make: MakeProgram, size: int, device: str = "cpu", config: PlacementConfig | None = None
    ) -> None:
        self.config = config or PlacementConfig()
        self._make = make
        self._size = size
        self._device = device
        self._placement: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._places: list[Place] = []
        self._runs: list[ray.ObjectRef] = []
        self._closing = threading.Event()
        self._fault: str | None = None
        self._faulted = threading.Event()
        self._watcher: threading.Thread | None = None

    def start(self, on_fault: Callable[[str], None] | None = None) -> list[Ready]:
        """Places and starts every rank; on failure nothing is left behind and the error names rank, node and cause."""
        try:
            self._place()
            self._check_open()
            self._meet()
            self._check_open()
            ready = self._await_ready()
        except BaseException:
            self._end(ask=False)
            raise
        self._watcher = threading.Thread(target=self._watch, args=(on_fault,), name="worker-group-watch", daemon=True)
        self._watcher.start()
        return ready

    def wait_fault(self, timeout: float) -> str | None:
        """What ended the group, if anything does within the time."""
        self._faulted.wait(timeout)
        return self._fault

    def close(self) -> None:
        """Ends every rank: asked first, killed after `stop_timeout_s`. Harmless when repeated."""
        self._end(ask=self._fault is None)

    def _end(self, ask: bool) -> None:
        self._closing.set()
        if self._runs and ask:
            for actor in self._actors:
                actor.stop.remote()
            ray.wait(self._runs, num_returns=len(self._runs), timeout=self.config.stop_timeout_s, fetch_local=False)
        for actor in self._actors:
            ray.kill(actor)
        if self._runs:
            ray.wait(self._runs, num_returns=len(self._runs), timeout=self.config.stop_timeout_s, fetch_local=False)
        if self._placement is not None:
            remove_placement_group(self._placement)
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(self.config.stop_timeout_s)
        self._actors, self._runs, self._placement = [], [], None

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise WorkerError("the group was closed while it started")

    def _place(self) -> None:
        """Reserves the ranks' resources, or says what is missing."""
        config = self.config
        self._await_room()
        self._placement = placement_group([bundle(self._device)] * self._size, strategy=config.strategy)
        deadline = time.monotonic() + config.place_timeout_s
        while not self._placement.wait(PULSE_S) and not self._closing.is_set():
            if time.monotonic() < deadline:
                continue
            free = ray.available_resources()
            raise WorkerError(
                f"{self._size} ranks were not placed within {config.place_timeout_s:g} s: the cluster is large "
                f"enough but busy ({free.get('CPU', 0):g} CPU cores and {free.get('GPU', 0):g} GPUs are free); "
                "stop other work or wait longer"
            )

    def _await_room(self) -> None:
        """Until the cluster is large enough, if its nodes are given time to join."""
        deadline = time.monotonic() + self.config.join_timeout_s
        while True:
            try:
                return check_room(ray.nodes(), self._size, self._device, self.config.strategy)
            except ConfigError:
                if time.monotonic() >= deadline or self._closing.wait(PULSE_S):
                    raise

    def _meet(self) -> None:
        """Starts the actors and calls each one's `run` with its place."""
        nodes = self._nodes_of_bundles()
        bundles = bundles_in_rank_order(nodes)
        nodes = [nodes[index] for index in bundles]
        actor_class = ray.remote(Worker)
        for rank in range(self._size):
            strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=bundles[rank])
            options = actor_class.options(
                num_cpus=1,
                num_gpus=1 if self._device == "cuda" else 0,
                max_concurrency=4,  # run, ready, stop, and one question
                max_restarts=0,
                scheduling_strategy=strategy,
            )
            self._actors.append(options.remote(rank, self.config.log_level))
        try:
            port = ray.get(self._actors[0].free_port.remote(), timeout=self.config.start_timeout_s)
        except (RayActorError, GetTimeoutError) as error:
            raise WorkerError(f"rank 0 on {nodes[0]}: its process did not start: {describe(error)}") from error
        self._places = assign(nodes, f"tcp://{nodes[0]}:{port}" if self._size > 1 else None)
        self._runs = [
            actor.run.remote(place, self._make) for actor, place in zip(self._actors, self._places, strict=True)
        ]

    def _nodes_of_bundles(self) -> list[str]:
        assert self._placement is not None, "bundles exist once placed"
        where = placement_group_table(self._placement)["bundles_to_node_id"]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        return [addresses[where[index]] for index in range(self._size)]

    def _await_ready(self) -> list[Ready]:
        """Every rank's report; the first failure or the time limit ends the wait."""
        deadline = time.monotonic() + self.config.start_timeout_s
        reports = [actor.ready.remote() for actor in self._actors]
        ready: dict[ray.ObjectRef, Ready] = {}
        while len(ready) < self._size:
            waiting = [report for report in reports if report not in ready]
            if time.monotonic() > deadline:
                raise WorkerError(self._slow(waiting, reports))
            for report in ray.wait(waiting, timeout=PULSE_S)[0]:
                try:
                    ready[report] = ray.get(report)
                except (WorkerError, RayActorError) as error:
                    raise self._root_cause().at_start() from error
        return [ready[report] for report in reports]

    def _slow(self, waiting: Sequence[ray.ObjectRef], reports: Sequence[ray.ObjectRef]) -> str:
        late = []
        for place, actor, report in zip(self._places, self._actors, reports, strict=True):
            if report in waiting:
                late.append(f"{place} (in {_ask(actor)})")
        return (
            f"not ready within {self.config.start_timeout_s:g} s: {'; '.join(late)}; "
            "raise placement.start_timeout_s if the checkpoint is large or the disk slow"
        )

    def _root_cause(self) -> Fault:
        """Of the ranks that have failed or fail within a moment, the one that the others' failures follow from."""
        ray.wait(self._runs, num_returns=len(self._runs), timeout=GRACE_S)
        ended, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        faults = []
        for place, run in zip(self._places, self._runs, strict=True):
            if run in ended:
                try:
                    ray.get(run)
                    faults.append(Fault(place, None))
                except Exception as error:  # noqa: BLE001 - a rank may end in any way; the fault carries it on
                    faults.append(Fault(place, error))
        return root_cause(faults)

    def _watch(self, on_fault: Callable[[str], None] | None) -> None:
        ended: list[ray.ObjectRef] = []
        while not ended:
            ended, _ = ray.wait(self._runs, timeout=PULSE_S)
            if self._closing.is_set():
                return
        self._fault = self._root_cause().message()
        self._faulted.set()
        log.error("%s", self._fault)
        if on_fault is not None:
            on_fault(self._fault)


def _ask(actor: Any) -> str:
    try:
        return str(ray.get(actor.phase.remote(), timeout=2.0))
    except (GetTimeoutError, RayActorError):
        return "an unknown phase: its process does not answer"
