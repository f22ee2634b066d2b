"""Fixtures shared by all tests. `ranks(size, fn, *args, comm="shm")` runs fn(group, *args) on that many processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ranks import Ranks


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
