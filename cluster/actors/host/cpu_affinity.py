"""A rank's share of its node: cores, threads, memory.

Called in the rank's own thread, before anything else starts threads, because affinity is a thread's and is inherited.
Knows no model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from cluster.actors.group.placement import Place
from parallel.native.compiled.library import set_threads

CGROUP = Path("/sys/fs/cgroup")
FILE_PAGES = ("active_file", "inactive_file")
"""What the kernel keeps of files, of a checkpoint above all, until the room is needed: counted as used, yet free."""


def claim_cores(place: Place, threads: int | None, device: str) -> tuple[int, ...]:
    """Pins the calling thread to its share of the node's cores and sets the number of threads; the cores, or () where
    there are too few."""
    cores = share(sorted(os.sched_getaffinity(0)), place.local_rank, place.local_size)
    count = threads or max(1, len(cores))
    torch.set_num_threads(count)
    set_threads(count)
    if cores and device == "cpu":
        os.sched_setaffinity(0, cores)
        return tuple(cores)
    return ()


def share(cores: Sequence[int], local_rank: int, local_size: int) -> Sequence[int]:
    """The local rank's run of cores, the first ones one longer; empty where ranks outnumber cores (pinning would make
    it worse)."""
    if len(cores) < local_size:
        return ()
    short, extra = divmod(len(cores), local_size)
    start = local_rank * short + min(local_rank, extra)
    return cores[start : start + short + (local_rank < extra)]


def free_memory(place: Place, device: str) -> int:
    """Bytes that this rank may take: what its GPU has free, or its part of what its host (or container) has."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return min(_available(), _left_in_container()) // place.local_size


def _available() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_container() -> int:
    """Under a container's limit, where there is one."""
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return 1 << 62
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        lines = (line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        pages = sum(int(value) for name, value in lines if name in FILE_PAGES)
        return int(limit) - used + pages
    except FileNotFoundError:
        return 1 << 62
