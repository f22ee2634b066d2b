"""Fixtures shared by all tests. `ranks(size, fn, *args, comm="shm")` runs fn(group, *args) on that many processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from launch.ray.ray_config import ENVIRONMENT
from tests.ranks import Ranks


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """A command that runs in the test's own process sets these for good; the processes of later tests are not its."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Ranks]:
    """The session's worker processes themselves, for tests that need every rank's outcome."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks(rank_pool: Ranks) -> Callable[..., list[Any]]:
    """Run a module-level function on several ranks and return their results."""
    return rank_pool.run
