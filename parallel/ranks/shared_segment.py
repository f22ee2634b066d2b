"""The memory that the ranks of one host share: an anonymous file that never has a name, so nothing can be left behind.

Rank 0 makes it (memfd) when all ranks have come to the start; the others, processes of the same user that see the same
process numbers, open it through rank 0's entry in /proc, which the rendezvous store names. It needs no room in
/dev/shm. Where a sandbox refuses memfd, a file is made in /dev/shm, else in the temporary folder, and its name is taken
away at once. What is in it is the business of native/src/comm.h; here is only what a rank's line says of a failure.
"""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from parallel.errors import CollectiveError
from parallel.ranks.comm import KINDS

log = logging.getLogger(__name__)
SHM = "/dev/shm"  # the system's own memory file system; tempfile gives names in it that nobody else can take
TIMEOUT, DIED, LEFT, MISMATCH, NO_MEMORY = 1, 2, 3, 4, 5
FAILED = 3


def memory_identity() -> str:
    """Equal on two processes that run under the same boot of one system and see each other's process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"


def share(store: dist.Store, name: str, rank: int, size: int, note: str) -> list[str]:
    """Every rank's note, once all have left one."""
    store.set(f"{name}/{rank}", note)
    keys = [f"{name}/{r}" for r in range(size)]
    try:
        store.wait(keys)
    except RuntimeError as error:
        absent = [r for r, key in enumerate(keys) if not store.check([key])]
        raise CollectiveError(f"ranks {absent} of {size} did not come to the start of the group ({name})") from error
    return [store.get(key).decode() for key in keys]


def map_segment(store: dist.Store, rank: int, nbytes: int) -> tuple[mmap.mmap, int]:
    """The group's segment, and a descriptor of it that rank 0 must keep open until all ranks have mapped it."""
    fd = _offer(store, nbytes) if rank == 0 else _accept(store, rank)
    try:
        return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), fd
    except OSError as error:
        os.close(fd)
        raise CollectiveError(f"rank {rank} cannot map {nbytes >> 20} MiB of shared memory ({error})") from error


def _offer(store: dist.Store, nbytes: int) -> int:
    """Its memory is reserved at once: too little must be an error here, not a bus error later."""
    try:
        fd = anonymous_file(nbytes)
    except CollectiveError as error:
        store.set("segment", f"none: {error}")
        raise
    store.set("segment", f"/proc/{os.getpid()}/fd/{fd}")
    return fd


def anonymous_file(nbytes: int) -> int:
    """A descriptor of so many reserved bytes, from the first place that has them."""
    refusals = []
    for place, make in (("memfd", _memfd), (SHM, lambda: _unnamed(SHM)), ("", lambda: _unnamed(tempfile.gettempdir()))):
        place = place or tempfile.gettempdir()
        try:
            fd = make()
        except (OSError, AttributeError) as error:  # AttributeError: a system that has no memfd
            refusals.append(f"{place}: {error}")
            continue
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            os.close(fd)
            refusals.append(f"{place}: {error}")
            continue
        if refusals:
            log.warning("the ranks share a file without a name in %s (%s)", place, "; ".join(refusals))
        return fd
    raise CollectiveError(
        f"rank 0 cannot reserve {nbytes >> 20} MiB of shared memory ({'; '.join(refusals)}); allow one of these, or "
        "choose transport 'gloo'"
    )


def _memfd() -> int:
    return os.memfd_create("tp-decoders")


def _unnamed(folder: str) -> int:
    """A file of this user alone whose name is gone before anything is in it."""
    fd, path = tempfile.mkstemp(prefix="tp-decoders-", dir=folder)
    os.unlink(path)
    return fd


def _accept(store: dist.Store, rank: int) -> int:
    try:
        name = store.get("segment").decode()
    except RuntimeError as error:
        raise CollectiveError(f"rank {rank}: rank 0 named no shared segment in time ({error})") from error
    if name.startswith("none: "):
        raise CollectiveError(name.removeprefix("none: "))
    try:
        return os.open(name, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise CollectiveError(
            f"rank {rank} cannot open the shared segment of rank 0 ({error}); "
            "run all ranks of a host as one user, or choose transport 'gloo'"
        ) from error


class Report:
    """What a rank's line in shared memory says about it."""

    WIDTH = 7

    def __init__(self, rounds: int, kind: int, nbytes: int, call: int, state: int, blame: int, died: int) -> None:
        self.rounds = rounds
        size = f" of {nbytes} bytes" if nbytes >= 0 else ""
        self.call = f"{KINDS[kind]} number {call}{size}" if kind else "no collective yet"
        self.failed = state == FAILED
        self.blame = (blame >> 16, blame & 0xFFFF)
        self.died = bool(died)


def cause(code: int, culprit: int, ranks: Sequence[Report], limit: float, depth: int = 0) -> str:
    """The fault of `culprit` in words; where it stopped for a reason of its own, that reason too."""
    last = f"its last: {ranks[culprit].call}"
    if code == MISMATCH:
        return (
            f"the ranks are out of step, rank {culprit} is in {ranks[culprit].call}; "
            "all must issue the same collectives, of the same size, in the same order"
        )
    if code == DIED:
        return f"the process of rank {culprit} died ({last})"
    if code == NO_MEMORY:
        return f"rank {culprit} had no memory left for it ({last})"
    if code == TIMEOUT:
        return f"rank {culprit} did not arrive within {limit:g} s ({last})"
    if not ranks[culprit].failed or depth == len(ranks):
        return f"rank {culprit} closed its end ({last})"
    return f"rank {culprit} stopped because " + cause(*ranks[culprit].blame, ranks, limit, depth + 1)
