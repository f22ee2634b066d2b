"""How `serve` ends where Ray's own processes ended first: at once, with what can still be done, and with words.

A service manager may signal every process of a control group, and any process can be killed. What Ray's library is
asked then waits for a minute before it ends the process itself, so nothing more is asked of it, and threads that wait
for it are left behind.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from cluster.safe_text import visible
from parallel.errors import TpError

if TYPE_CHECKING:
    from cluster.actors.host.ray_head import RayHead

log = logging.getLogger(__name__)
SIGNAL_S = 1.0
"""How long after Ray's end the signal that ended it may reach this process, too."""


class Leaving:
    """`behind`: threads of this process wait for what will not come."""

    behind = False


class RayWatch:
    """In the event loop: `gone` is set when Ray's own processes have ended before their time; `words` say which."""

    def __init__(self, head: RayHead, loop: asyncio.AbstractEventLoop) -> None:
        self._head, self._loop = head, loop
        self.gone = asyncio.Event()
        head.observe(self._hear)

    def _hear(self, _: str) -> None:
        try:
            self._loop.call_soon_threadsafe(self.gone.set)
        except RuntimeError:
            log.debug("the event loop is closed already")

    @property
    def words(self) -> str:
        return f"the engine is gone: {self._head.lost}; the ranks ended with it: start the server again"

    async def settled(self, signalled: asyncio.Event) -> None:
        """Until it can be told whether this process was signalled, too."""
        with suppress(TimeoutError):
            await asyncio.wait_for(signalled.wait(), SIGNAL_S)

    def let_threads_go(self) -> None:
        """The loop's end waits for its threads, unless what they wait for will not come."""
        if self.gone.is_set():
            self._loop.set_default_executor(ThreadPoolExecutor(1, "ending"))


@contextmanager
def prompt_end() -> Iterator[Leaving]:
    """Around a command: ends the process with its block where threads had to be left behind."""
    leaving, status = Leaving(), 1
    try:
        yield leaving
        status = 0
    except TpError as error:
        if not leaving.behind:
            raise
        print(visible(f"tp-decoders serve: {error}"), file=sys.stderr)
    finally:
        if leaving.behind:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


async def first_of(*waits: Any) -> None:
    """Until the first of them is done."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
