"""The thread that writes the ledger's folder, so that no stream waits for a disk that is slow.

Each write is waited for, PATIENCE_S at the longest: as long as the disk is quick, what a reader has seen is written.
Once a write took longer nothing is waited for until all is written; that is said in the log, and `behind_seconds` tells
how old the oldest write is that waits. What waits is bounded: beyond MOST_BEHIND_BYTES it is dropped, counted as a
failure, and a new base is asked for when the disk has caught up.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from cluster.frontend.ledger.ledger_files import LedgerFolder
from cluster.supervision import supervised

log = logging.getLogger(__name__)
PATIENCE_S = 0.05
MOST_BEHIND_BYTES = 64 << 20
CLOSE_S = 10.0
Base = Callable[[], Iterable[bytes]]


class LedgerWriter:
    """Everything that is written to `folder`, in order. Used from one thread."""

    def __init__(self, folder: LedgerFolder) -> None:
        self._folder = folder
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._times: deque[tuple[float, int]] = deque()  # of what waits: since when, and its bytes
        self._behind_bytes = 0
        self._idle = threading.Event()
        self._lock = threading.Lock()
        self._slow = self._dropped = self._broken = False
        self._base_asked = False
        self.drops = 0
        """Writes that were given up because too much waited."""
        self._thread = supervised("ledger", self._run, self._fail)

    @property
    def behind_seconds(self) -> float:
        """Since when the oldest write that waits does; 0 where none waits."""
        oldest = next(iter(self._times), None)
        return 0.0 if oldest is None else time.monotonic() - oldest[0]

    @property
    def behind_bytes(self) -> int:
        return self._behind_bytes

    @property
    def wants_base(self) -> bool:
        """Whether what counts should be written anew."""
        if self._base_asked or self._broken:
            return False
        return not self._times if self._dropped else self._folder.wants_base

    def append(self, payload: bytes) -> None:
        if self._broken or self._dropped:
            return
        if self._behind_bytes + len(payload) > MOST_BEHIND_BYTES:
            self._dropped, self.drops = True, self.drops + 1
            log.error("the ledger is %d bytes behind its disk: it is begun anew once that answers", self._behind_bytes)
            return
        self._put(partial(self._folder.append, [payload]), len(payload))

    def begin(self, base: Base) -> None:
        """A new log and base, after what was appended so far."""
        self._base_asked, self._dropped = True, False
        self._put(partial(self._begin, base), 0)

    def close(self) -> None:
        """What waits is written, within CLOSE_S, and the next server let in."""
        self._work.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.error("the ledger's disk does not answer: %d bytes are not written", self._behind_bytes)
        self._folder.close(CLOSE_S)

    def _put(self, work: Callable[[], None], size: int) -> None:
        with self._lock:
            self._times.append((time.monotonic(), size))
            self._behind_bytes += size
            self._idle.clear()
        self._work.put(work)
        if not self._slow and not self._idle.wait(PATIENCE_S) and not self._broken:
            self._slow = True
            log.warning("the ledger's disk takes longer than %g s for a write; streams do not wait for it", PATIENCE_S)

    def _begin(self, base: Base) -> None:
        try:
            self._folder.begin(base)
        finally:
            self._base_asked = False

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            with self._lock:
                _, size = self._times.popleft()
                self._behind_bytes -= size
                if not self._times:
                    if self._slow:
                        log.warning("the ledger's disk has caught up")
                    self._slow = False
                    self._idle.set()

    def _fail(self, error: Exception) -> None:
        """What no write should raise: answers are given as ever, but nothing more is remembered of them."""
        with self._lock:
            self._broken, self._behind_bytes = True, 0
            self._times.clear()
            self._folder.failures += 1
            self._idle.set()
