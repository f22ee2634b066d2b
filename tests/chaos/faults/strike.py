"""One fault after another, each with the times it took to be named and to be healed.

    settled -> strike -> named (its own words, in the command's output) -> mended -> tokens and steps flow -> settled

What is not named, or does not heal within its limit, is a violation like a lost token, and ends the run. The state the
world must be in before the next fault: all streams fresh, training taking steps, all nodes there.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.rpc.client.client import AsyncClient, ServiceError
from cluster.training.checkpoint.checkpoint_writer import complete_steps
from tests.chaos.faults.kinds import KINDS, SERVING, TRAINING, Strike, World
from tests.chaos.harness.hosts import HEAD
from tests.chaos.harness.jobs import Supervised, until
from tests.chaos.harness.load import Load
from tests.multinode.commands import Failed

NAMED_S, HEALED_S, SETTLED_S = 40.0, 180.0, 300.0
"""Limits of one fault on a machine whose two cores do everything; what it really took is reported."""
FRESH_S = 5.0
ROOM = 60
"""A lap this near its end is let to end first."""


@dataclass
class Record:
    """A fault and what came of it; seconds from the strike on."""

    number: int
    kind: str
    target: str = ""
    named: dict[str, float] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    healed: dict[str, float] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Striker:
    """Strikes and waits. `records` are the faults so far."""

    def __init__(self, world: World, load: Load, seed: int) -> None:
        self.world, self.load = world, load
        self.records: list[Record] = []
        self._rng = random.Random(seed)
        self.problems: list[str] = []

    async def strike(self, kind: str) -> Record:
        """One fault, from a healthy world back to one."""
        await self.settled()
        record = Record(len(self.records) + 1, kind)
        self.records.append(record)
        before = len(self.load.violations)
        began = time.monotonic()
        try:
            await self._one(record)
            await self.settled()
        except Failed as failure:
            record.violations.append(str(failure))
            raise
        finally:
            record.seconds = time.monotonic() - began
            record.violations += self.load.violations[before:]
            self.problems += [f"fault {record.number}, {kind}: {words}" for words in record.violations]
        return record

    async def _one(self, record: Record) -> None:
        world = self.world
        jobs: dict[str, Supervised] = {SERVING: world.served, TRAINING: world.training}
        marks = {job: len(commanded.lines) for job, commanded in jobs.items()}
        starts = {job: commanded.starts for job, commanded in jobs.items()}
        lap, file = world.training.lap, world.training.record_file()
        struck = time.monotonic()
        strike = KINDS[record.kind][1](world, self._rng)
        record.target = strike.target

        def named() -> bool:
            if world.training.lap != lap:  # it ended before this could reach it: a stopped raylet stops no rank
                strike.words.pop(TRAINING, None)
            for job, words in strike.words.items():
                if job in record.named:
                    continue
                if words is None:  # its supervisor sees it
                    gone = jobs[job].status is not None or jobs[job].starts > starts[job]
                    found = (time.monotonic(), "its process ended") if gone else None
                else:
                    found = jobs[job].said(words, marks[job])
                if found is not None:
                    record.named[job], record.words[job] = found[0] - struck, found[1][:300]
            return len(record.named) == len(strike.words)

        try:
            limit = HEALED_S if strike.at_restart else NAMED_S
            await until(named, limit, f"{record.kind} ({strike.target}) named by {sorted(strike.words)}", self.tend)
        finally:
            if strike.mend is not None:
                strike.mend()
        nodes = asyncio.create_task(asyncio.to_thread(self._restore, strike))
        try:
            await self._healed(record, strike, struck, (lap, file))
            if strike.after is not None:
                strike.after()
            if strike.prove is not None:
                await asyncio.to_thread(strike.prove)
            noticed = SERVING in strike.words and not strike.silent
            if noticed and not any(when >= struck for when in self.load.not_serving):
                record.violations.append("health never said NOT_SERVING")
        finally:
            await nodes

    def _restore(self, strike: Strike) -> None:
        """Ray again on a node that lost it."""
        for node in strike.nodes:
            self.world.hosts.clear(node)
            self.world.hosts.start(node)

    async def _healed(self, record: Record, strike: Strike, struck: float, life: tuple[int, int | None]) -> None:
        named = struck + max(record.named.values(), default=0.0)
        begun: dict[int | None, int] = {}

        def trains() -> bool:
            training = self.world.training
            file = training.record_file()
            if (training.lap, file) == life or file is None or training.status is not None:
                return False
            return training.step() > begun.setdefault(file, training.step())

        checks: dict[str, Callable[[], bool]] = {
            SERVING: lambda: self.load.all_heard_since(named), TRAINING: trains,
        }  # fmt: skip

        def all_healed() -> bool:
            for job in strike.words:
                if job not in record.healed and checks[job]():
                    record.healed[job] = time.monotonic() - struck
            return len(record.healed) == len(strike.words)

        await until(all_healed, HEALED_S, f"{record.kind} ({record.target}) healed", self.tend)

    def tend(self) -> None:
        """What a supervisor does: a command that ended is given again."""
        self.world.training.tend(again=True)
        if self.world.served.status is not None:
            self.world.served.start()

    async def settled(self) -> None:
        """Everything works: tokens, steps, nodes; and where the serving ranks are is known."""
        limit = time.monotonic() + SETTLED_S
        await until(self._flows, SETTLED_S, "tokens on all streams, steps and all nodes", self.tend)
        while (problem := await self._unwell()) is not None:
            if time.monotonic() > limit:
                raise Failed(f"not well within {SETTLED_S:g} s: {problem}")
            self.tend()
            await asyncio.sleep(0.3)
        step, lap = self.world.training.step(), self.world.training.lap
        moved = lambda: self.world.training.lap != lap or self.world.training.step() > step  # noqa: E731
        await until(moved, SETTLED_S, "a training step", self.tend)
        await until(self._flows, SETTLED_S, "tokens on all streams, steps and all nodes", self.tend)

    def _flows(self) -> bool:
        world = self.world
        return (
            self.load.all_heard_since(time.monotonic() - FRESH_S)
            and world.training.status is None
            and world.training.step() <= world.training.steps - ROOM
            and len(complete_steps(world.training.out)) >= 2
            and all(world.hosts.raylet(number) is not None for number in world.hosts.numbers if number != HEAD)
            and len(world.ranks(TRAINING)) == 2 == len(world.ranks(SERVING))
        )

    async def _unwell(self) -> str | None:
        """Why not, where health does not say SERVING or the ranks that are reported are not those that are there."""
        try:
            async with AsyncClient(self.world.served.address) as client:
                if (health := await client.health(timeout=5.0)) != "SERVING":
                    return f"health says {health}: {(await client.server_info(timeout=5.0)).not_ready}"
                ranks = (await client.load(timeout=5.0)).ranks
        except ServiceError as error:
            return str(error)
        self.world.places = {rank.rank: (rank.node, rank.pid) for rank in ranks}
        found = [rank for rank, _, _ in self.world.ranks(SERVING)]
        return None if sorted(found) == [0, 1] else f"{self.world.places} are reported, {found} are there"
