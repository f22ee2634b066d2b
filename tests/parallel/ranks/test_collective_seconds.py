"""How long ranks are in collectives is counted by kind: a rank that waits for a late peer shows it, commands apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from parallel.ranks.comm import waited
from parallel.ranks.group import Group
from parallel.sharding.tree import ReductionTree

Run = Callable[..., list[Any]]
LATE_S = 0.6


def late_in(group: Group, kind: str) -> None:
    """One collective of a kind, to which rank 1 comes late; a barrier before lets all begin together."""
    talk, tree = group.talk, ReductionTree.over(8, group.size)
    x = torch.ones(tree.node_counts[group.rank], 3)
    half = torch.ones(2, dtype=torch.float16)  # takes another way than float32 in shared memory
    calls: dict[str, Callable[[], object]] = {
        "tree_sum": lambda: talk.tree_sum(x, tree),
        "sum": lambda: talk.sum(torch.ones(3)),
        "all_reduce_max": lambda: talk.all_reduce_max(half),
        "all_gather": lambda: talk.all_gather(torch.ones(2), [2] * group.size, 0),
        "gather": lambda: talk.gather(torch.ones(2), [2] * group.size, 0),
        "broadcast_bytes": lambda: talk.broadcast_bytes(b"command" if group.rank == 0 else None),
        "barrier": talk.barrier,
    }
    talk.barrier()
    if group.rank == (0 if kind == "broadcast_bytes" else 1):
        time.sleep(LATE_S)
    calls[kind]()


def seconds_in(group: Group, kinds: tuple[str, ...]) -> tuple[dict[str, float], float, set[str]]:
    before, waited_before = dict(group.talk.seconds), waited(group.comm)
    for kind in kinds:
        late_in(group, kind)
    spent = {kind: time - before.get(kind, 0.0) for kind, time in group.talk.seconds.items()}
    return spent, waited(group.comm) - waited_before, set(group.talk.counts)


KINDS = ("tree_sum", "sum", "all_reduce_max", "all_gather", "gather", "barrier", "broadcast_bytes")


@pytest.mark.parametrize("comm", ["shm", "gloo"])
def test_who_waits_for_a_late_rank_counts_the_time_under_the_kind_it_waited_in(ranks: Run, comm: str) -> None:
    (first, in_all, counted), (second, in_all_of_second, _) = ranks(2, seconds_in, KINDS, comm=comm)
    assert set(first) == set(second) == counted >= set(KINDS)
    least = LATE_S / 3  # a barrier does not let all go at the very same moment
    assert {kind: first[kind] > least for kind in KINDS[:-1]} == dict.fromkeys(KINDS[:-1], True)
    assert second["broadcast_bytes"] > least
    for seconds, of_kinds in ((in_all, first), (in_all_of_second, second)):
        assert seconds == pytest.approx(sum(of_kinds.values()) - of_kinds["broadcast_bytes"])
