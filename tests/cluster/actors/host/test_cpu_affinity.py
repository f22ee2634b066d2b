"""How ranks share a node's cores and memory."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from cluster.actors.group.placement import Place
from cluster.actors.host import cpu_affinity
from cluster.actors.host.cpu_affinity import claim_cores, free_memory, share


def test_cores_are_shared_out_without_overlap_and_without_rest() -> None:
    shares = [list(share([0, 2, 4, 6, 8], rank, 2)) for rank in range(2)]
    assert shares == [[0, 2, 4], [6, 8]]


def test_more_ranks_than_cores_are_not_pinned() -> None:
    assert not share([0, 1], 0, 3)


def test_pinning_is_the_calling_threads_alone() -> None:
    before = os.sched_getaffinity(0)
    claimed: list[tuple[int, ...]] = []
    inside: list[set[int]] = []

    def claim() -> None:
        claimed.append(claim_cores(Place(rank=0, world=1, node="here", local_size=len(before)), 1, "cpu"))
        inside.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=claim)
    thread.start()
    thread.join()
    assert inside[0] == set(claimed[0]) == {min(before)}
    assert os.sched_getaffinity(0) == before


def test_ranks_of_one_host_share_its_free_memory() -> None:
    alone = free_memory(Place(rank=0, world=1, node="here"), "cpu")
    half = free_memory(Place(rank=0, world=2, node="here", local_size=2), "cpu")
    assert 0.4 * alone < half < 0.6 * alone


def test_in_a_container_what_the_kernel_keeps_of_files_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "memory.max": "1000000\n", "memory.current": "900000\n",
        "memory.stat": "anon 100000\nfile 800000\nshmem 50000\ninactive_file 500000\nactive_file 250000\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cpu_affinity, "CGROUP", tmp_path)
    place = Place(rank=0, world=2, node="here", local_size=2)
    assert free_memory(place, "cpu") == (1000000 - 900000 + 750000) // 2
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(place, "cpu") > 1000000
