"""Joining a Ray cluster, or starting one on this machine for as long as it is needed.

A local cluster is asked for by name (address "local"): without it Ray would join whatever a stale address file points
at. Reads no environment of its own; what a standing cluster needs there is in docs/serving.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from parallel.errors import ConfigError, WorkerError

OBJECT_STORE_BYTES = 100_000_000
"""Nothing large travels through the object store: plans go over the ranks' own collectives, weights come from files."""


@contextmanager
def ray_session(address: str | None = None, num_cpus: int | None = None, log_to_driver: bool = True) -> Iterator[None]:
    """Connected to `address`, or to a cluster of this machine alone that ends with the block."""
    if num_cpus is not None and num_cpus < 1:
        raise ConfigError(f"num_cpus is {num_cpus}; a local Ray cluster needs at least 1")
    if num_cpus is not None and address is not None:
        raise ConfigError(
            f"num_cpus={num_cpus} is for a local cluster; {address} has the cores it has: leave num_cpus out"
        )
    options = {"log_to_driver": log_to_driver, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if address is None:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **options,
            )
        else:
            ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "a local Ray cluster"
        raise WorkerError(
            f"could not reach {where}: {first_line(error)}; `ray status` on its head says more"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def first_line(error: BaseException) -> str:
    """An exception's message without the stack that Ray writes under it."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
