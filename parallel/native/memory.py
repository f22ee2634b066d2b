"""Memory for what stays: packed weights side by side, on 2 MiB pages where the system has them.

Memory from the C library's heap has mostly been touched before, in small pages, and keeps them; so these chunks are
mapped afresh and marked before their first use. A chunk goes back to the system when nothing in it is used any more.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

PAGE = 2 << 20
CHUNK = 32 << 20
LINE = 64


class Arena:
    """Hands out pieces of large mappings, one after another; none is handed out twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: Tensor | None = None
        self._used = 0

    def take(self, nbytes: int) -> Tensor:
        """Uninitialised bytes on a cache line; on a page of their own where they fill one."""
        with self._lock:
            align = PAGE if nbytes >= PAGE else LINE
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
