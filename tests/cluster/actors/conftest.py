"""One local Ray cluster for all tests of this folder."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import ray

from cluster.actors.host.ray_session import ray_session

CORES = 3


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    with ray_session(num_cpus=CORES, log_to_driver=False):
        yield


@pytest.fixture(autouse=True)
def free_cores(request: pytest.FixtureRequest) -> None:
    """A test begins when Ray has taken back what the one before it held."""
    if "local_ray" in request.fixturenames:
        await_free_cores()


def await_free_cores(within: float = 60.0) -> None:
    limit = time.monotonic() + within
    while (free := ray.available_resources().get("CPU")) != CORES:
        assert time.monotonic() < limit, f"something still holds a core: {free} of {CORES} are free"
        time.sleep(0.1)
