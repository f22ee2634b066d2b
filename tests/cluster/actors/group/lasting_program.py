"""A program that outlives its peers, without a model: it notices a peer's death as a collective would, and remembers
for how many lives it has been there."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.actors.group.placement import Place
from cluster.actors.group.worker import MakeProgram, Phases, is_consequence
from parallel.errors import CheckpointError, CollectiveError


@dataclass(frozen=True)
class MakeLasting:
    """Ranks meet in a folder. `fail_life`: rank 1's start fails in that life; `error`: what rank 1 raises in the first
    life, and when."""

    folder: str
    fail_life: int | None = None
    error_after: float | None = None
    start_seconds: float = 0.0

    def __call__(self, place: Place, phases: Phases) -> LastingProgram:
        return LastingProgram(self, place)


class LastingProgram:
    """Works until it is stopped or a peer is gone."""

    def __init__(self, plan: MakeLasting, place: Place) -> None:
        self.plan, self.place = plan, place
        self.stopped = threading.Event()
        self.lives = 0
        self.peers: list[int] = []

    def start(self) -> dict[str, int]:
        place, folder = self.place, Path(self.plan.folder)
        time.sleep(self.plan.start_seconds)
        if place.rank == 1 and place.life == self.plan.fail_life:
            raise CheckpointError("no checkpoint in this life")
        written = folder / f"part-{place.life}-{place.rank}"
        written.write_text(str(os.getpid()))
        written.rename(folder / f"{place.life}-{place.rank}")
        self.peers = [self._pid_of(rank) for rank in range(place.world) if rank != place.rank]
        self.lives += 1
        return {"rank": place.rank, "lives": self.lives, "pid": os.getpid()}

    def rejoin(self, make: MakeProgram, place: Place, phases: Phases) -> dict[str, int]:
        assert isinstance(make, MakeLasting)
        self.plan, self.place = make, place
        return self.start()

    def part(self, error: BaseException) -> bool:
        return is_consequence(error)

    def run(self) -> None:
        began = time.monotonic()
        while not self.stopped.wait(0.05):
            if not all(map(_runs, self.peers)):
                raise CollectiveError("a peer died")
            late = self.plan.error_after is not None and time.monotonic() - began > self.plan.error_after
            if late and self.place.rank == 1 and self.place.life == 0:
                raise RuntimeError("an error of its own")

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        """Nothing was opened."""

    def _pid_of(self, rank: int) -> int:
        path, limit = Path(self.plan.folder) / f"{self.place.life}-{rank}", time.monotonic() + 120
        while not path.exists():
            if time.monotonic() > limit:
                raise CollectiveError(f"rank {rank} did not come")
            time.sleep(0.02)
        return int(path.read_text())


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
