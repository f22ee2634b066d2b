"""What a long load says of itself, and of which parts of a start it is said that they took too long."""

from __future__ import annotations

import logging

import pytest

from cluster.actors.group.placement import Place
from cluster.actors.host import load_progress
from cluster.actors.host.load_progress import BUDGETS, LoadProgress, over_budget, progress_line


def place(local_rank: int = 0) -> Place:
    return Place(rank=local_rank, world=2, node="10.0.0.1", local_rank=local_rank, local_size=2)


def test_a_line_says_bytes_rate_and_what_is_left() -> None:
    line = progress_line("reading weights", 10_000_000_000, 41_000_000_000, 500e6)
    assert line == "reading weights: 10.0 of 41.0 GB (24 %), 500 MB/s, 62 s left"
    assert progress_line("x", 0, 1_000_000_000, 0.0) == "x: 0.0 of 1.0 GB (0 %), 0 MB/s"


def test_one_rank_of_a_node_speaks_every_few_seconds_and_of_what_it_did_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(load_progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)  # these lines are shown all the same
    for rank in (0, 1):
        told = LoadProgress(place(rank))
        for second in range(13):
            now[0] = 100.0 + second
            told("copying weights to this host", int(1e9 + second * 1e8), int(5e9))
        told("reading weights", 0, int(5e9))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" (")[0] for line in lines] == [
        "copying weights to this host: 1.5 of 5.0 GB",
        "copying weights to this host: 2.0 of 5.0 GB",
    ]
    assert all("100 MB/s" in line for line in lines), "what lay there before is no part of the rate"


def test_a_part_over_its_budget_is_named_with_what_to_look_at() -> None:
    seconds = {"imports": BUDGETS["imports"][0] + 1, "warming up": 0.1, "waiting for the other ranks": 1e6}
    (line,) = over_budget(place(), seconds)
    assert line.startswith("rank 0 on 10.0.0.1: imports took 31.0 s, more than its budget of 30 s; look at how fast")
    large = 40_000_000_000
    assert over_budget(place(), {"reading weights": 200.0}, large) == []
    (line,) = over_budget(place(), {"reading weights": 230.0}, large)
    assert "budget of 220 s" in line and "placement.weights_cache" in line
