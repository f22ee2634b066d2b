"""One local Ray cluster for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.actors.session import ray_session


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    with ray_session(num_cpus=3, log_to_driver=False):
        yield
