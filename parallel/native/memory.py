"""Where packed matrices live: an arena for what stays, a scratch for what one product needs, the heap otherwise.

The arena puts packed weights side by side, on 2 MiB pages where the system has them: memory from the C library's heap
has mostly been touched before, in small pages, and keeps them; so its chunks are mapped afresh and marked before their
first use. A chunk goes back to the system when nothing in it is used any more. The scratch is kept for the next
product, since the system zeroes every page that is given back and asked for again.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Callable

import torch
from torch import Tensor

PAGE = 2 << 20
CHUNK = 32 << 20
LINE = 64
KEPT_SCRATCH = 64 << 20
"""Bytes: larger scratch goes back to the system at once. gemm.cpp has the same limit for its own."""
Place = Callable[[int], Tensor]
"""A number of bytes to that many, uninitialised, on a cache line."""


def alignment(nbytes: int) -> int:
    """Where so many bytes of an arena begin: what is lost before them is at most a sixteenth."""
    return PAGE if nbytes >= 16 * PAGE else LINE


class Arena:
    """Hands out pieces of large mappings, one after another; none is handed out twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: Tensor | None = None
        self._used = 0

    def take(self, nbytes: int) -> Tensor:
        """Uninitialised bytes on a cache line; from a page's beginning on where they fill many."""
        with self._lock:
            align = alignment(nbytes)
            start = -(-self._used // align) * align
            if self._chunk is None or start + nbytes > len(self._chunk):
                self._chunk, start = _mapping(max(CHUNK, nbytes)), 0
            self._used = start + nbytes
            return self._chunk[start : start + nbytes]


def _mapping(nbytes: int) -> Tensor:
    """A new private mapping, starting on a page, in huge pages where the system has them."""
    mapping = mmap.mmap(-1, -(-nbytes // PAGE) * PAGE + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: ordinary ones then
            mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    offset = -whole.data_ptr() % PAGE
    return whole[offset : offset + -(-nbytes // PAGE) * PAGE]


weights = Arena()
"""Where packed weights live."""


class Scratch(threading.local):
    """One piece of memory for each thread; what is taken is good until the next is."""

    def __init__(self) -> None:
        self._kept = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        if nbytes > KEPT_SCRATCH:
            return heap(nbytes)
        if nbytes > len(self._kept):
            self._kept = heap(nbytes)
        return self._kept[:nbytes]


scratch = Scratch()
"""For a packed matrix that one product reads."""


def give_back() -> None:
    """Returns what the C library holds of freed memory to the system, whatever it was told to keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(ctypes.c_size_t(0))


def heap(nbytes: int) -> Tensor:
    """From the C library."""
    raw = torch.empty(nbytes + LINE, dtype=torch.uint8)
    offset = -raw.data_ptr() % LINE
    return raw[offset : offset + nbytes]
