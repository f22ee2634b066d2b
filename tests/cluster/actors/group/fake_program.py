"""Programs for worker tests: they start, run and fail as told, without a model."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.actors.group.placement import Place
from cluster.actors.group.worker import Phases
from parallel.errors import CheckpointError, CollectiveError


@dataclass(frozen=True)
class MakeFake:
    """Makes a program that fails at one moment on one rank."""

    fail: str | None = None  # start | run | exit | return
    on_rank: int = 0
    start_seconds: float = 0.0
    folder: str | None = None  # each rank writes a file there when it is closed
    meet: str | None = None  # all ranks begin to run when each has written one there

    def __call__(self, place: Place, phases: Phases) -> FakeProgram:
        return FakeProgram(self, place, phases)


class FakeProgram:
    """Waits until stopped; peers of a failing rank fail a moment before it, as in a collective."""

    def __init__(self, plan: MakeFake, place: Place, phases: Phases) -> None:
        self.plan, self.place, self.phases = plan, place, phases
        self.fail = plan.fail if place.rank == plan.on_rank else None
        self.stopped = threading.Event()
        self.thread: int | None = None

    def start(self) -> dict[str, int]:
        self.thread = threading.get_ident()
        with self.phases("reading weights"):
            time.sleep(self.plan.start_seconds)
            if self.fail == "start":
                raise CheckpointError("no checkpoint at /nowhere")
        return {"rank": self.place.rank, "pid": os.getpid()}

    def run(self) -> None:
        assert threading.get_ident() == self.thread, "a program starts and runs in one thread"
        if self.fail == "return":
            return
        self._meet()
        if self.fail is not None:
            time.sleep(0.6)
            if self.fail == "exit":
                os._exit(7)
            raise RuntimeError("first line\nthe reason")
        if self.plan.fail == "run":
            time.sleep(0.3)
            raise CollectiveError(f"rank {self.plan.on_rank} did not come")
        self.stopped.wait()

    def _meet(self) -> None:
        if self.plan.meet is not None:
            Path(self.plan.meet, f"runs-{self.place.rank}").touch()
            while len(list(Path(self.plan.meet).glob("runs-*"))) < self.place.world:
                time.sleep(0.01)

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        if self.plan.folder:
            with open(f"{self.plan.folder}/{self.place.rank}", "w", encoding="utf-8") as file:
                file.write(str(os.getpid()))
