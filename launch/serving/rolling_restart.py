"""All replicas of a server kept alive, and restarted one after the other when somebody asks (Control.Restart, SIGHUP).

A replica that cannot be healed stays out while another one serves, and an order to restart tries it again; the server
ends when all of them are out. What is done for one replica is launch.serving.healing's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from cluster.frontend.fleet.fleet import Restarted
from cluster.frontend.frontend import Frontend
from cluster.request_errors import RestartRefused
from launch.serving.healing import Healer, Unhealable, check_restart
from parallel.errors import TpError

log = logging.getLogger(__name__)


class ReplicaHealers:
    """The healers of all replicas, in their order."""

    def __init__(self, frontend: Frontend, healers: Sequence[Healer]) -> None:
        self._frontend, self._healers = frontend, healers
        self._out: dict[int, Unhealable] = {}
        self._rolling: asyncio.Task[Restarted] | None = None
        frontend.observe(lambda _: frontend.fleet.wake())

    async def run(self) -> None:
        """Ends by raising what the last replica could not be healed of."""
        keeping = [asyncio.create_task(self._keep(index)) for index in range(len(self._healers))]
        try:
            await asyncio.gather(*keeping)
        finally:
            for task in keeping:
                task.cancel()

    async def _keep(self, index: int) -> None:
        while True:
            try:
                await self._healers[index].run()
            except Exception as failure:
                error = _as_unhealable(failure)
                self._out[index] = error
                if len(self._out) == len(self._healers):
                    raise
                log.error("replica %d stays out: %s", index, error)
                self._frontend.waits_for(f"{error}; it stays out until a restart is asked for", index)
            await self._healers[index].ordered()
            del self._out[index]

    def condemn(self, replica: int, cause: str) -> None:
        """An engine that canaries have proved not to work is replaced."""
        self._healers[replica].condemn(cause)

    async def restart(self, grace_s: float) -> Restarted:
        """One replica after the other; goes on where the caller does not wait for its end."""
        if self._rolling is not None and not self._rolling.done():
            raise RestartRefused("a restart is under way; wait for its end (GetServerInfo counts restarts)")
        check_restart(self._frontend)
        self._rolling = asyncio.create_task(self._roll(grace_s))
        self._rolling.add_done_callback(_tell)
        return await asyncio.shield(self._rolling)

    async def _roll(self, grace_s: float) -> Restarted:
        """Those that are out first: the others wait for them."""
        handed_over = 0
        replicas = self._frontend.fleet.replicas
        for replica in sorted(replicas, key=lambda each: each.seat is not None):
            log.warning("replica %d is restarted", replica.index)
            handed_over += await self._healers[replica.index].restart(grace_s)
        return Restarted(len(self._healers), handed_over)


def _as_unhealable(error: Exception) -> Unhealable:
    """What a healer raises beside what it means to is the end of its replica, too."""
    if isinstance(error, Unhealable):
        return error
    log.error("healing failed in a way nobody thought of", exc_info=error)
    return Unhealable(f"the engine is gone: healing it failed: {type(error).__name__}: {error}")


def _tell(rolling: asyncio.Task[Restarted]) -> None:
    """Also where nobody waits for it any more."""
    if rolling.cancelled():
        return
    error = rolling.exception()
    if isinstance(error, TpError):
        log.error("the restart stopped: %s", error)
    elif error is not None:
        log.error("the restart stopped", exc_info=error)
    else:
        done = rolling.result()
        log.warning("%d replicas were restarted, %d requests were handed over", done.replicas, done.handed_over)
