"""What goes wrong between ranks, on both transports: each fault ends in time, in an error that names the rank."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.errors import CollectiveError
from parallel.ranks.group import Group
from parallel.sharding.tree import ADD, ReductionTree
from tests.ranks import Outcome, RankDied, Ranks

Run = Callable[..., list[Any]]
COMMS = ("shm", "gloo")
AT_ONCE_S = 25.0
"""Of a limit of 60 for a collective: nobody waited for it."""


def sum_or_barrier(group: Group) -> None:
    group.talk.sum(torch.zeros(16)) if group.rank == 0 else group.talk.barrier()


def sum_or_max(group: Group) -> None:
    group.talk.sum(torch.zeros(16)) if group.rank == 0 else group.talk.all_reduce_max(torch.zeros(16))


def sum_of_other_length(group: Group) -> None:
    group.talk.sum(torch.zeros(64 + group.rank))


def gather_of_other_length(group: Group) -> None:
    sizes = [2] * group.size if group.rank == 0 else [2, *[3] * (group.size - 1)]
    group.talk.all_gather(torch.zeros(sizes[group.rank]), sizes, 0)


def one_rank_skips_a_command(group: Group) -> None:
    if group.rank != 1:
        group.talk.broadcast_bytes(b"step")
    group.talk.sum(torch.zeros(4))


def one_rank_skips_a_sum(group: Group) -> None:
    if group.rank == 0:
        group.talk.sum(torch.zeros(4))
    group.talk.broadcast_bytes(b"step")


def sums_of_other_counts(group: Group) -> None:
    """The same steps over as many nodes; but for rank 0 the third one comes from rank 1, for the others from rank 2."""
    tree = ReductionTree(8, ((0, 6), (6, 8), (8, 8)) if group.rank == 0 else ((0, 6), (6, 6), (6, 8)))
    assert tree.program() == (0, 1, 2, ADD, ADD)
    group.talk.tree_sum(torch.zeros(tree.node_counts[group.rank], 4), tree)


MISTAKES = [
    sum_or_barrier,
    sum_or_max,
    sum_of_other_length,
    gather_of_other_length,
    one_rank_skips_a_command,
    one_rank_skips_a_sum,
]


@pytest.mark.parametrize("comm", COMMS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_ranks_in_different_collectives_are_named(ranks: Run, mistake: Callable[..., Any], comm: str) -> None:
    with pytest.raises(CollectiveError, match=r"out of step.*same order|same order.*out of step") as raised:
        ranks(2, mistake, comm=comm)
    assert "rank 0 " in str(raised.value) and "rank 1 " in str(raised.value)


@pytest.mark.parametrize("comm", COMMS)
def test_ranks_that_count_the_nodes_of_a_sum_differently_are_named(ranks: Run, comm: str) -> None:
    with pytest.raises(CollectiveError, match="out of step"):
        ranks(3, sums_of_other_counts, comm=comm)


def late_barrier(group: Group) -> str:
    """Rank 1 comes after the others have given up."""
    if group.rank == 1:
        time.sleep(2.5)
    try:
        group.talk.barrier(timeout=0.4)
    except CollectiveError as error:
        return str(error)
    return "passed"


RANK_1 = r"rank 1 did not arrive|last to come was rank 1|not heard from: ranks \[1\]"
"""By shared memory; by gloo, which tells of the missing rank or of the one it waited for; by the ranks' own signs."""


@pytest.mark.parametrize("comm", COMMS)
def test_a_rank_that_does_not_arrive_is_named_and_the_group_stops(ranks: Run, comm: str) -> None:
    said = ranks(3, late_and_again, comm=comm)
    for first, second in (said[0], said[2]):
        assert "barrier" in first and re.search(RANK_1, first), first
        assert "stopped earlier" in second and "build a new group" in second
    assert "passed" not in said[1][1]


def late_and_again(group: Group) -> tuple[str, str]:
    first = late_barrier(group)
    try:
        group.talk.sum(torch.zeros(3))
    except CollectiveError as error:
        return first, str(error)
    return first, "passed"


def wait_for_a_command(group: Group) -> tuple[float, float, str]:
    """Seconds waited and seconds of CPU used by a rank whose command does not come."""
    began, used = time.monotonic(), time.process_time()
    if group.rank == 0:
        time.sleep(1.5)
        return 0.0, 0.0, ""
    try:
        group.talk.broadcast_bytes(None, timeout=1.0)
    except CollectiveError as error:
        return time.monotonic() - began, time.process_time() - used, str(error)
    return 0.0, 0.0, "received"


@pytest.mark.parametrize("comm", COMMS)
def test_waiting_for_a_command_is_cheap_and_ends_at_its_limit(ranks: Run, comm: str) -> None:
    waited, used, said = ranks(2, wait_for_a_command, comm=comm)[1]
    assert 0.9 < waited < 30.0 and used < 0.1 * waited, (waited, used)
    assert "broadcast_bytes" in said and "0" in said.split("rank")[-1]


def one_rank_leaves(group: Group) -> None:
    if group.rank == 1:
        group.talk.close()
        return
    group.talk.sum(torch.zeros(4))


@pytest.mark.parametrize("comm", COMMS)
def test_a_rank_that_left_is_not_waited_for(rank_pool: Ranks, comm: str) -> None:
    rank_pool.run(2, segment_count, comm=comm)
    began = time.monotonic()
    outcome = rank_pool.outcomes(2, one_rank_leaves, comm=comm)[0]
    assert isinstance(outcome.error, CollectiveError) and outcome.raised_at - began < AT_ONCE_S
    assert re.search(r"rank 1 closed its end|not heard from: ranks \[1\]", str(outcome.error))


def segments() -> list[str]:
    """The segments this process has mapped, as the system names them."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if "tp-decoders" in line and "rw-s" in line]


def die_in_a_wait(group: Group, folder: str, victim: int) -> None:
    group.talk.barrier()
    Path(folder, str(group.rank)).write_text("\n".join(segments()), encoding="utf-8")
    if group.rank == victim:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    group.talk.sum(torch.zeros(100_000))


def check_survivors(outcomes: list[Outcome], victim: int, began: float) -> None:
    assert isinstance(outcomes[victim].error, RankDied)
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            assert isinstance(outcome.error, CollectiveError), outcome
            assert outcome.raised_at - began < AT_ONCE_S


def test_a_killed_rank_is_named_at_once_and_leaves_nothing_behind(rank_pool: Ranks, tmp_path: Path) -> None:
    rank_pool.run(3, segment_count)
    began = time.monotonic()
    outcomes = rank_pool.outcomes(3, die_in_a_wait, str(tmp_path), 1)
    check_survivors(outcomes, 1, began)
    assert any("the process of rank 1 died" in str(outcome.error) for outcome in outcomes)
    names = {name for rank in range(3) for name in Path(tmp_path, str(rank)).read_text(encoding="utf-8").splitlines()}
    assert names == {"/memfd:tp-decoders (deleted)"}, names  # memory that has no name in any folder


def segment_count(group: Group) -> int:
    return len(segments())


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_over_gloo(rank_pool: Ranks, tmp_path: Path, victim: int) -> None:
    rank_pool.run(3, segment_count, comm="gloo")
    began = time.monotonic()
    outcomes = rank_pool.outcomes(3, die_in_a_wait, str(tmp_path), victim, comm="gloo")
    check_survivors(outcomes, victim, began)
    assert any(f"[{victim}]" in str(outcome.error) for outcome in outcomes)


def wrong_nodes(group: Group) -> None:
    group.talk.tree_sum(torch.zeros(3, 4), ReductionTree.over(8, group.size))


def test_nodes_that_are_not_the_trees_are_refused(ranks: Run) -> None:
    with pytest.raises(CollectiveError, match="given 3 nodes of .*the tree over 8 leaves has 1 float32 nodes"):
        ranks(2, wrong_nodes)


def late_slot(group: Group) -> None:
    group.talk.slot(64)
    group.talk.barrier()
    group.talk.tree_sum_in_place((4,), ReductionTree.over(2, 2))


def test_a_slot_asked_for_before_another_collective_is_refused(ranks: Run) -> None:
    with pytest.raises(CollectiveError, match="no slot was asked for since the last collective"):
        ranks(2, late_slot)


def closed_twice(group: Group) -> str:
    group.talk.barrier()
    group.talk.close()
    group.talk.close()
    try:
        group.talk.barrier()
    except CollectiveError as error:
        return str(error)
    return "passed"


@pytest.mark.parametrize("comm", COMMS)
def test_a_closed_comm_refuses_work(ranks: Run, comm: str) -> None:
    assert all("closed" in said for said in ranks(2, closed_twice, comm=comm))
