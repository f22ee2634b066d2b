"""The thread that writes the ledger's folder, so that no stream waits for a disk that is slow.

Each write is waited for, PATIENCE_S at the longest: as long as the disk is quick, what a reader has seen is written.
Once a write took longer nothing is waited for until all is written, what waits goes down together, and `behind_seconds`
tells how old the oldest of it is. What waits is bounded: beyond MOST_BEHIND_BYTES it is dropped, counted as a failure,
and a new base is asked for when the disk has caught up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import takewhile

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
        self._waiting: deque[tuple[float, bytes]] = deque()  # since when, and what; nothing: it is the base's turn
        self._base: Base | None = None  # asked for, and not begun yet
        self._changed = threading.Condition()
        self._slow = self._dropped = self._closed = False
        self.behind_bytes = 0
        """What waits for the disk."""
        self._thread = supervised("ledger", self._run, self._fail)

    @property
    def behind_seconds(self) -> float:
        """How old the oldest write is that waits; 0 where none does."""
        with self._changed:
            return time.monotonic() - self._waiting[0][0] if self._waiting else 0.0

    @property
    def wants_base(self) -> bool:
        """Whether what counts should be written anew."""
        if self._base is not None or self._closed:
            return False
        return not self._waiting if self._dropped else self._folder.wants_base

    def append(self, payload: bytes) -> None:
        if self._closed or self._dropped:
            return
        if self.behind_bytes + len(payload) > MOST_BEHIND_BYTES:
            self._dropped, self._folder.failures = True, self._folder.failures + 1
            log.error("the ledger is %d bytes behind its disk: it is begun anew once that answers", self.behind_bytes)
            return
        self._put(payload)

    def begin(self, base: Base) -> None:
        """A new log and base, after what was appended so far."""
        if not self._closed:
            self._base, self._dropped = base, False
            self._put(b"")

    def close(self) -> None:
        """What waits is written, within CLOSE_S, and the next server let in."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.error("the ledger's disk does not answer: %d bytes are not written", self.behind_bytes)
        self._folder.close(CLOSE_S)

    def _put(self, payload: bytes) -> None:
        with self._changed:
            self._waiting.append((time.monotonic(), payload))
            self.behind_bytes += len(payload)
            self._changed.notify_all()
            if not self._slow and not self._changed.wait_for(lambda: not self._waiting, PATIENCE_S):
                self._slow = True
                log.warning("the ledger's disk takes longer than %g s for a write; streams go on", PATIENCE_S)

    def _next(self) -> list[bytes]:
        """What is written together: all that comes before the next base; nothing once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            waiting = [payload for _, payload in self._waiting]
            return list(takewhile(len, waiting)) or waiting[:1]

    def _run(self) -> None:
        while batch := self._next():
            if batch[0]:
                self._folder.append(batch)
            elif (base := self._base) is not None:
                self._folder.begin(base)
                self._base = None if self._base is base else self._base
            with self._changed:
                for payload in batch:
                    self._waiting.popleft()
                    self.behind_bytes -= len(payload)
                if not self._waiting:
                    if self._slow:
                        log.warning("the ledger's disk has caught up")
                    self._slow = False
                    self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        """What no write should raise: answers are given as ever, but nothing more is remembered of them."""
        with self._changed:
            self._closed, self.behind_bytes = True, 0
            self._waiting.clear()
            self._folder.failures += 1
            self._changed.notify_all()
