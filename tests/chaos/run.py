"""A whole run: the cluster, both jobs and the load on it, faults until there were enough, and the undisturbed end.

Everything is below one folder, logs included. Knows no namespaces: it is given the hosts.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import report
from tests.chaos.faults.kinds import World, drawn, possible
from tests.chaos.faults.strike import Striker
from tests.chaos.harness.hosts import Hosts, switches
from tests.chaos.harness.jobs import Lap, Served, Training, until
from tests.chaos.harness.load import Load
from tests.cluster.engine.tiny_models import save_tiny
from tests.multinode.commands import Failed

LAP_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of what."""

    faults: int
    seed: int
    minutes: float
    tokens: int = 200  # of a stream
    steps: int = 1000  # of a lap
    kinds: Sequence[str] = ()  # these, in this order, in place of drawn ones


class Run:
    """One run of faults; `problems` are what must not be."""

    def __init__(self, hosts: Hosts, base: Path, text: Path, host: str, port: int, disk: Path | None = None) -> None:
        self.hosts, self.base = hosts, base
        for name in ("logs", "runs", "state"):
            (base / name).mkdir(mode=0o700, exist_ok=True)
        model = save_tiny("gpt_neox", base / "model", max_position_embeddings=512)
        self.served = Served(hosts, model, base / "state", base / "logs/serve.log", port, host)
        self.problems: list[str] = []
        self._disk, self._text = disk, text

    def go(self, plan: Plan) -> int:
        return asyncio.run(self._go(plan))

    async def _go(self, plan: Plan) -> int:
        began = time.monotonic()
        await self._nodes()
        say(f"three nodes after {time.monotonic() - began:.0f} s")
        training = Training(
            self.hosts, self.base, self._disk or self.base / "runs", self._text, self.base / "logs/train.log",
            plan.steps,
        )  # fmt: skip
        try:
            return await self._with(plan, training, began)
        finally:
            for each in (self.served, training):  # after a failure
                each.kill()

    async def _with(self, plan: Plan, training: Training, began: float) -> int:
        load = Load(self.served.address, plan.tokens)
        await asyncio.gather(self._learn(load, began), self._lap(training, began))
        striker = Striker(World(self.hosts, self.served, training, switches(self.base), self._disk), load, plan.seed)
        load.start()
        try:
            await self._faults(plan, striker, began)
            await self._end(training, load)
        except Failed as failure:
            self.problems.append(str(failure))
        finally:
            minutes = (time.monotonic() - began) / 60
            report.write(self.base / "logs", plan.seed, striker.records, load, training.laps, minutes)
        return self._judge(plan, striker, load, training.laps, minutes)

    async def _nodes(self) -> None:
        """The head, then the others."""
        head, *others = self.hosts.numbers
        await asyncio.to_thread(self.hosts.start, head)
        await asyncio.gather(*(asyncio.to_thread(self.hosts.start, number) for number in others))

    async def _learn(self, load: Load, began: float) -> None:
        self.served.start()
        await asyncio.to_thread(self.served.await_ready)
        await load.learn()
        say(f"serving, {len(load.known)} undisturbed answers known after {time.monotonic() - began:.0f} s")

    async def _lap(self, training: Training, began: float) -> None:
        """One whole run that nobody disturbs: what all others are compared with."""
        training.start()
        await until(lambda: training.status is not None, LAP_S, "the undisturbed lap")
        if training.status != 0:
            raise Failed(f"the undisturbed lap: status {training.status}: {training.lines[-3:]}")
        training.tend(again=True)
        say(f"an undisturbed lap of {training.steps} steps after {time.monotonic() - began:.0f} s")

    async def _faults(self, plan: Plan, striker: Striker, began: float) -> None:
        rng = random.Random(plan.seed)
        kinds = plan.kinds or drawn(possible(striker.world), plan.faults, rng)
        for kind in kinds:
            if (time.monotonic() - began) / 60 > plan.minutes:
                raise Failed(f"{len(striker.records)} of {len(kinds)} faults within {plan.minutes:g} minutes")
            try:
                await striker.strike(kind)
            finally:
                say(line(striker))

    async def _end(self, training: Training, load: Load) -> None:
        """Open streams end, and the lap under way, which saw the last faults, too."""
        await load.stop()
        lap = training.lap
        tend = lambda: training.tend(again=training.status != 0)  # noqa: E731
        await until(lambda: training.lap != lap, LAP_S, "the last lap", tend)
        if (status := await asyncio.to_thread(self.served.stop)) != 0:
            raise Failed(f"the server ended with status {status}")

    def _judge(self, plan: Plan, striker: Striker, load: Load, laps: Sequence[Lap], minutes: float) -> int:
        print(f"\n{report.rows(striker.records)}\n\n{report.summary(striker.records, load, laps, minutes)}", flush=True)
        self.problems += [f"lap {lap.number} ended with other bits" for lap in laps if not lap.same]
        self.problems += [*striker.problems, *(word for word in load.violations if word not in str(striker.problems))]
        for problem in self.problems:
            print(f"WRONG (seed {plan.seed}, {len(striker.records)} faults): {problem}", flush=True)
        return 1 if self.problems else 0


def line(striker: Striker) -> str:
    """What the last fault was and what it took."""
    if not striker.records:
        return "no fault struck"
    record = striker.records[-1]
    named = ", ".join(f"{job} {seconds:.1f} s" for job, seconds in record.named.items())
    healed = ", ".join(f"{job} {seconds:.1f} s" for job, seconds in record.healed.items())
    wrong = f"  WRONG: {'; '.join(record.violations)}" if record.violations else ""
    return (
        f"{record.number:3}  {record.kind}: {record.target}; named: {named or 'no'}; healed: {healed or 'no'}; "
        f"{record.seconds:.0f} s{wrong}"
    )


def say(words: str) -> None:
    print(words, flush=True)
