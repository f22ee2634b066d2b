"""What the signals to `serve` ask for: an end in order, an end at once, or fresh ranks.

SIGHUP is the order to a daemon to begin anew. In a terminal it says that this was closed, which ends the server in
order, as any program that ran there. Where it is ignored from the start (`nohup`) it stays so.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable

from parallel.errors import TpError

log = logging.getLogger(__name__)
TERMINAL_S = 0.2
"""How long after its SIGHUP a terminal may still seem to be there."""
Restart = Callable[[], Awaitable[object]]


class Signals:
    """SIGINT and SIGTERM as events: the first asks to stop, any further one to hurry. SIGHUP restarts the replicas."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.stop, self.again = asyncio.Event(), asyncio.Event()
        self.restart: Restart | None = None
        self._loop = loop
        self._restarts: set[asyncio.Task[None]] = set()
        self._in_terminal = _has_terminal()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._take)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGHUP, loop.call_later, TERMINAL_S, self._hang_up)

    def _take(self) -> None:
        (self.again if self.stop.is_set() else self.stop).set()

    def _hang_up(self) -> None:
        if self._in_terminal and not _has_terminal():
            if not self.stop.is_set():
                log.warning("SIGHUP: the terminal was closed, and the server ends")
            self.stop.set()
        elif self.restart is None:
            log.warning("SIGHUP: nothing is restarted before the server is ready")
        else:
            task = self._loop.create_task(self._restart(self.restart))
            self._restarts.add(task)
            task.add_done_callback(self._restarts.discard)

    async def _restart(self, restart: Restart) -> None:
        try:
            await restart()
        except TpError as error:
            log.error("SIGHUP: %s", error)
        except Exception:
            log.exception("SIGHUP: the restart failed")


def end_undisturbed() -> None:
    """What is left of the end takes seconds at most, and no further signal breaks it off half-way."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
