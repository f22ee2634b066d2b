"""The memory that the ranks of one host share: a file that has no name left once all of them have mapped it.

Rank 0 makes it when all ranks have come to the start, mode 0600 under a random name, in /dev/shm or else in the
temporary folder. The name travels through the rendezvous store. What is in the segment is the business of
native/comm.h.
"""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
from pathlib import Path

import torch.distributed as dist

from parallel.errors import CollectiveError

SHM_DIR = Path("/dev/shm")


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


def map_segment(store: dist.Store, rank: int, nbytes: int) -> tuple[mmap.mmap, Path]:
    """The group's segment: made by rank 0 once all ranks are there, opened by the others."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    if rank == 0:
        path, fd = _offer(store, nbytes, flags | os.O_CREAT | os.O_EXCL)
    else:
        path, fd = _accept(store, rank, flags)
    try:
        return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)), path
    finally:
        os.close(fd)


def _offer(store: dist.Store, nbytes: int, flags: int) -> tuple[Path, int]:
    try:
        path, fd = _create(nbytes, flags)
    except CollectiveError as error:
        store.set("segment", f"none: {error}")
        raise
    store.set("segment", str(path))
    return path, fd


def _accept(store: dist.Store, rank: int, flags: int) -> tuple[Path, int]:
    try:
        name = store.get("segment").decode()
    except RuntimeError as error:
        raise CollectiveError(f"rank {rank}: rank 0 named no shared segment in time ({error})") from error
    if name.startswith("none: "):
        raise CollectiveError(name.removeprefix("none: "))
    try:
        return Path(name), os.open(name, flags)
    except OSError as error:
        raise CollectiveError(f"rank {rank} cannot open the segment of rank 0 ({error}); was it too late?") from error


def _create(nbytes: int, flags: int) -> tuple[Path, int]:
    """A new file with its memory reserved: a full /dev/shm must be an error here, not a bus error later."""
    failures = []
    for folder in (SHM_DIR, Path(tempfile.gettempdir())):
        path = folder / f"tp-decoders-{secrets.token_hex(16)}"
        try:
            fd = os.open(path, flags, 0o600)
            try:
                os.posix_fallocate(fd, 0, nbytes)
                return path, fd
            except OSError:
                os.close(fd)
                path.unlink()
                raise
        except OSError as error:
            failures.append(str(error))
    raise CollectiveError(f"no room for {nbytes >> 20} MiB of shared memory ({'; '.join(failures)}); enlarge {SHM_DIR}")
