"""Work that would hold the event loop up, in threads beside it: one piece at a time of each caller.

Python runs in one thread at a time, so a piece here slows the loop down a little while it lasts; what lets the
interpreter go (tokenizers' batches, numpy) does not. A caller's next piece waits until its last one is over, also
where nobody waits for that any more: with many pieces it holds up itself alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class FairThreadPool:
    """Used from one event loop."""

    def __init__(self, threads: int = 2) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fair-pool")
        self._last: dict[str, asyncio.Future[object]] = {}

    async def run(self, caller: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function returns or raises."""
        while (last := self._last.get(caller)) is not None:
            await asyncio.wait([last])
        context, loop = copy_context(), asyncio.get_running_loop()
        work = loop.run_in_executor(self._pool, lambda: context.run(function, *args, **kwargs))
        self._last[caller] = work  # type: ignore[assignment]
        work.add_done_callback(lambda done: self._over(caller, done))
        return await asyncio.shield(work)

    def _over(self, caller: str, work: asyncio.Future[T]) -> None:
        if not work.cancelled():
            work.exception()  # whoever asked may be gone
        del self._last[caller]

    def close(self) -> None:
        """Nothing more is taken; what runs is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)
