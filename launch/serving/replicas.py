"""The ranks of all replicas of one server: what each is made of, started side by side, ended together.

A replica is a WorkerGroup of parallel.tp ranks with a key and a flight recorder of its own. Which of them gets a
request is the front-end's business, what happens to a lost one launch.serving.healing's.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from cluster.actors.group.detached_group import DetachedGroup
from cluster.actors.group.placement import PlacementConfig
from cluster.actors.group.resource_shares import ResourceShares, await_room
from cluster.actors.group.worker import Ready
from cluster.actors.group.worker_group import WorkerGroup
from cluster.actors.programs.serve_program import ServeProgram
from cluster.frontend.frontend import Frontend
from cluster.link.socket_link import SocketLink
from launch.serving.healing import Healer
from launch.serving.ray_loss import first_of
from launch.serving.state_file import Left, StateFile
from parallel.errors import TpError, WorkerError

log = logging.getLogger(__name__)


class Replicas:
    """`start` once; `close` ends everything, also what is still starting."""

    def __init__(
        self, program: ServeProgram, count: int, placement: PlacementConfig, state: StateFile | None = None
    ) -> None:
        self._parallel, self._placement, self._state = program.parallel, placement, state
        self._closing = threading.Event()
        self._specs = [_of_its_own(program) for _ in range(count)]
        self._left = state.left() if state else None
        self._make_groups(self._left)

    def _make_groups(self, left: Sequence[Left] | None) -> None:
        """Not started yet, with the keys of those that were left if there are any."""
        if left:
            self._specs = [replace(spec, authkey=each.authkey) for spec, each in zip(self._specs, left, strict=True)]
        self._roster = ResourceShares(len(self._specs))
        self._groups = [self._group(index, spec) for index, spec in enumerate(self._specs)]

    def _group(self, index: int, spec: ServeProgram) -> WorkerGroup:
        size, device, share = self._parallel.tp, self._parallel.device, partial(self._roster.share, index)
        if self._state is None:
            return WorkerGroup(spec, size, device, self._placement, share)
        detached = self._state.detached(index)
        return DetachedGroup(spec, size, device, self._placement, share, detached=detached, moved=self._moved)

    def _moved(self) -> None:
        """A group has started, or was rebuilt: once all are there, the next command is told where."""
        groups = [group for group in self._groups if isinstance(group, DetachedGroup) and group.found]
        if self._state is not None and len(groups) == len(self._groups):
            self._state.write(groups, self._specs)

    async def start(self) -> list[list[Ready]]:
        """What the ranks of each replica report: those that a command before this one left, if all of them go on, else
        new ones. Where one does not start none is left."""
        if self._left and (ready := await asyncio.to_thread(self._adopted, self._left)):
            return ready
        if len(self._groups) > 1:
            room = partial(await_room, closing=self._closing)
            tp, device = self._parallel.tp, self._parallel.device
            await asyncio.to_thread(room, len(self._groups), tp, device, self._placement)
        starts = [asyncio.create_task(asyncio.to_thread(group.start)) for group in self._groups]
        await asyncio.wait(starts, return_when=asyncio.FIRST_EXCEPTION)
        failed = [(index, task.exception()) for index, task in enumerate(starts) if task.done() and task.exception()]
        if failed:
            await self.close()
            await asyncio.gather(*starts, return_exceptions=True)
            raise _named(*failed[0], len(starts))  # type: ignore[arg-type]
        return [task.result() for task in starts]

    def _adopted(self, left: Sequence[Left]) -> list[list[Ready]] | None:
        """All replicas that were left, as they are; None where one cannot be taken over."""
        ready = []
        no_wait = threading.Event()
        no_wait.set()
        try:
            for index, (group, each) in enumerate(zip(self._groups, left, strict=True)):
                assert isinstance(group, DetachedGroup), "only those are left by a command"
                ready.append(group.adopt(each.where))
                self._roster.share(index, [rank.place for rank in ready[-1]], no_wait)
        except WorkerError as error:
            log.warning("%s; all ranks are started anew", error)
            for group in self._groups:
                if isinstance(group, DetachedGroup):
                    group.forgo()
            self._make_groups(None)
            return None
        log.warning("the ranks that an earlier command left at work were taken over: nothing was loaded")
        return ready

    async def close(self, ray_lost: asyncio.Event | None = None) -> None:
        """All at once; without Ray where that is lost, also meanwhile."""
        self._closing.set()
        gone = ray_lost or asyncio.Event()
        groups = [] if gone.is_set() else self._groups
        closing = [asyncio.create_task(asyncio.to_thread(group.close)) for group in groups]
        if closing:
            await first_of(asyncio.wait(closing), gone.wait())
        if gone.is_set():
            for group in self._groups:
                group.abandon()
        else:
            await asyncio.gather(*closing)
        if self._state is not None:
            self._state.clear()

    def connect(self, ready: Sequence[Sequence[Ready]]) -> list[SocketLink]:
        """A link to each replica's engine."""
        return [
            SocketLink(ranks[0].facts.engine_address, spec.authkey)
            for ranks, spec in zip(ready, self._specs, strict=True)
        ]

    def healers(self, frontend: Frontend, ready: Sequence[Sequence[Ready]]) -> list[Healer]:
        """What keeps an engine in each replica's place."""
        parts = zip(self._groups, self._specs, ready, strict=True)
        return [Healer(group, frontend, spec, ranks, index) for index, (group, spec, ranks) in enumerate(parts)]


def _of_its_own(program: ServeProgram) -> ServeProgram:
    """With a key and a flight recorder of its own."""
    flight = replace(program.flight, group=secrets.token_hex(4))
    return replace(program, authkey=secrets.token_bytes(32), flight=flight)


def _named(index: int, error: BaseException, count: int) -> BaseException:
    """With the replica's number, where there are several."""
    return type(error)(f"replica {index}: {error}") if count > 1 and isinstance(error, TpError) else error
