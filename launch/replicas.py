"""The ranks of all replicas of one server: what each is made of, started side by side, ended together.

A replica is a WorkerGroup of parallel.tp ranks with a key and a flight recorder of its own. Which of them gets a
request is the front-end's business, what happens to a lost one launch.healing's.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.actors.group import WorkerGroup
from cluster.actors.roster import Roster, await_room
from cluster.actors.spec import FlightSpec, ServeSpec, TrainingConfig
from cluster.actors.worker import Ready
from cluster.frontend.frontend import Frontend
from cluster.frontend.socket_link import SocketLink
from launch.healing import Healer
from parallel.errors import TpError

if TYPE_CHECKING:
    from launch.serve import ServeConfig


class Replicas:
    """`start` once; `close` ends everything, also what is still starting."""

    def __init__(self, config: ServeConfig, model: Path, log_level: int) -> None:
        self._parallel = config.parallel
        self._placement = replace(config.placement, log_level=log_level)
        self._closing = threading.Event()
        self._specs = [_spec(config, model) for _ in range(config.parallel.dp)]
        roster = Roster(len(self._specs))
        self._groups = [
            WorkerGroup(
                spec, config.parallel.tp, config.parallel.device, self._placement, partial(roster.share, index)
            )
            for index, spec in enumerate(self._specs)
        ]

    async def start(self) -> list[list[Ready]]:
        """What the ranks of each replica report. Where one does not start none is left."""
        if len(self._groups) > 1:
            room = partial(await_room, closing=self._closing)
            parallel = self._parallel
            await asyncio.to_thread(room, parallel.dp, parallel.tp, parallel.device, self._placement)
        starts = [asyncio.create_task(asyncio.to_thread(group.start)) for group in self._groups]
        await asyncio.wait(starts, return_when=asyncio.FIRST_EXCEPTION)
        failed = [(index, task.exception()) for index, task in enumerate(starts) if task.done() and task.exception()]
        if failed:
            await self.close()
            await asyncio.gather(*starts, return_exceptions=True)
            raise _named(*failed[0], len(starts))  # type: ignore[arg-type]
        return [task.result() for task in starts]

    async def close(self) -> None:
        """All at once."""
        self._closing.set()
        await asyncio.gather(*(asyncio.to_thread(group.close) for group in self._groups))

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


def _named(index: int, error: BaseException, count: int) -> BaseException:
    """With the replica's number, where there are several."""
    return type(error)(f"replica {index}: {error}") if count > 1 and isinstance(error, TpError) else error


def _spec(config: ServeConfig, model: Path) -> ServeSpec:
    return ServeSpec(
        model=str(model),
        task=config.task,
        adapter=None if config.adapter is None else str(Path(config.adapter).resolve()),
        authkey=secrets.token_bytes(32),
        parallel=replace(config.parallel, dp=1),  # a replica knows of no other
        engine=config.engine,
        training=_training(config.training),
        start_timeout_s=config.placement.start_timeout_s,
        weights_cache=config.placement.weights_cache,
        flight=FlightSpec(secrets.token_hex(4), _folder(config.observe.flight_dir)),
    )


def _folder(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def _training(config: TrainingConfig) -> TrainingConfig:
    """With the root as a path that means the same on every rank, whose working folders differ."""
    root = config.save_root
    return config if root is None else replace(config, save_root=str(Path(root).expanduser().resolve()))
