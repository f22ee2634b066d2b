"""What processes hold, sampled while they work: resident memory and open file handles, of a process and all below it.

Reads /proc. `verdicts` fits a line through what was seen after the warm-up, robustly (Theil and Sen: the median of the
slopes between pairs), and says of every process that lived through it whether it grew. Draws nothing.
"""

from __future__ import annotations

import itertools
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.launch.training.kill_training import family_of

PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 1e6
MOST_MB_PER_MINUTE = 1.0
MOST_HANDLES = 1.0
"""More in the judged time is growth; less is noise of connections that come and go."""
FEWEST = 4
PAIRED = 400
"""Samples of which pairs are made at most: the others are thinned out evenly."""
NAMES = ((r"ray::", "ray worker, idle"), (r"\bserve\b", "server"), (r"gcs_server", "gcs"), (r"raylet/raylet", "raylet"))


@dataclass(frozen=True)
class Sample:
    """One process at one moment."""

    seconds: float
    name: str
    pid: int
    memory_mb: float
    handles: int


@dataclass(frozen=True)
class Verdict:
    """How one process fared after the warm-up."""

    name: str
    pid: int
    samples: int
    first_mb: float
    last_mb: float
    mb_per_minute: float
    handles: int  # in the middle
    more_handles: float  # over the judged time

    @property
    def flat(self) -> bool:
        return self.mb_per_minute < MOST_MB_PER_MINUTE and self.more_handles < MOST_HANDLES


def look(pid: int, ranks: dict[int, int], seconds: float) -> Iterator[Sample]:
    """A sample of each process of the family; `ranks` says which process is which rank."""
    for each in sorted(family_of(pid)):
        folder = Path(f"/proc/{each}")
        try:
            words = folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            pages = int(folder.joinpath("statm").read_text().split()[1])
            handles = len(os.listdir(folder / "fd"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has gone
            continue
        name = f"rank {ranks[each]}" if each in ranks else name_of(words)
        yield Sample(seconds, name, each, pages * PAGE_MB, handles)


def name_of(command: str) -> str:
    """What a process is to be called in a table."""
    script = re.search(r"/(?:_private/)?(?:runtime_env/)?(?:agent/)?([\w-]+)\.py", command)
    for pattern, name in NAMES:
        if re.search(pattern, command) and not (name == "raylet" and script and "agent" in command.split()[1:2]):
            return name
    return f"ray {script[1]}" if script else (command.split() or ["gone"])[0].rsplit("/", 1)[-1][:24]


def verdicts(samples: Sequence[Sample], warm_up_s: float, end_s: float) -> list[Verdict]:
    """Of every process that was there from the warm-up's end (nearly) to the last sample."""
    judged: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        if sample.seconds >= warm_up_s:
            judged.setdefault((sample.name, sample.pid), []).append(sample)
    length = end_s - warm_up_s
    return [
        _verdict(seen) for seen in judged.values()
        if len(seen) >= FEWEST and seen[-1].seconds - seen[0].seconds >= 0.9 * length
    ]  # fmt: skip


def _verdict(seen: Sequence[Sample]) -> Verdict:
    seconds = [sample.seconds for sample in seen]
    memory = slope(seconds, [sample.memory_mb for sample in seen])
    handles = slope(seconds, [float(sample.handles) for sample in seen])
    return Verdict(
        name=seen[0].name, pid=seen[0].pid, samples=len(seen),
        first_mb=statistics.median(sample.memory_mb for sample in seen[:5]),
        last_mb=statistics.median(sample.memory_mb for sample in seen[-5:]),
        mb_per_minute=60.0 * memory,
        handles=int(statistics.median(sample.handles for sample in seen)),
        more_handles=handles * (seconds[-1] - seconds[0]),
    )  # fmt: skip


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line through the points: the median over all pairs, which a few outliers do not move."""
    step = max(1, len(x) // PAIRED)
    points = list(zip(x[::step], y[::step], strict=True))
    rises = [(d - b) / (c - a) for (a, b), (c, d) in itertools.combinations(points, 2) if c > a]
    return statistics.median(rises) if rises else 0.0
