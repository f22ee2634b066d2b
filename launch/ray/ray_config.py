"""Which Ray cluster a command works on, and the environment of one that it starts."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cluster.actors.group.placement import Strategy, check_replicas
from parallel.errors import ConfigError

ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves the ranks on a machine that does anything else
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anyone unless asked for
    "RAY_DEDUP_LOGS": "0",  # what two ranks say alike is still said by two ranks
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # a signal while Ray starts ends it at once, not in half a minute
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # a lost peer is reported by name; torch's C++ stack adds nothing
    "MALLOC_ARENA_MAX": "1",  # these three: a step finds the memory of the last one again, where glibc would give it
    "MALLOC_MMAP_THRESHOLD_": "4294967296",  # back and have the system zero it anew: a tenth of a training step
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}
"""Of a Ray cluster started here, unless set already; a standing one has its own."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Which Ray cluster: None starts one on this machine, with its cores or `num_cpus`, that ends with the server."""

    address: str | None = None  # HOST:PORT of a standing cluster's head, or auto: the one of this user on this machine
    num_cpus: int | None = None  # of the local cluster
    oversubscribe: bool = False  # as many cores for Ray as there are ranks: on CPUs ranks then share the real ones

    def __post_init__(self) -> None:
        if self.oversubscribe and (self.address is not None or self.num_cpus is not None):
            given = "address" if self.address is not None else "num_cpus"
            raise ConfigError(f"ray.oversubscribe has no effect beside ray.{given}; leave one of them out")
        if self.num_cpus is not None and self.num_cpus < 1:
            raise ConfigError(f"ray.num_cpus is {self.num_cpus}; give at least 1, or leave it out for all cores")
        if self.num_cpus is not None and self.address is not None:
            raise ConfigError(
                f"ray.num_cpus={self.num_cpus} is for a cluster that is started here; {self.address} has its "
                "own cores: leave it out (ray.num_cpus=null)"
            )

    def room(self, replicas: int, tp: int, device: str, strategy: Strategy) -> int | None:
        """How many cores a local cluster is told to have; None: what Ray finds. Refuses before anything starts what
        this machine cannot hold; a standing cluster is asked once joined.
        """
        if self.address is not None:
            return None
        cores = max(replicas * tp, len(os.sched_getaffinity(0))) if self.oversubscribe else self.num_cpus
        found = {"CPU": cores or os.cpu_count() or 1}
        if device == "cuda":
            from torch import cuda

            found["GPU"] = cuda.device_count()
        check_replicas([{"Alive": True, "Resources": found}], replicas, tp, device, strategy)
        return cores
