"""Lines that show how a long load goes on, and the limits that the parts of a start are expected to keep.

One rank of each node speaks, every few seconds, and not at all of a load that is over before. A part that took longer
than its budget is named with what to look at; nothing is ended for it (`placement.start_timeout_s` does that).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from cluster.actors.group.placement import Place
from tp_decoders.files.filesystem import advice
from tp_decoders.files.weights_cache import WeightsCache

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)  # shown whatever else is: somebody waits
LINE_S = 5.0
NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
RATE = 200e6
"""Bytes per second at which a rank is expected to read its weights, beside what any load takes."""


class LoadProgress:
    """What a load tells of itself, in lines: bytes of the total, rate, time left."""

    def __init__(self, place: Place) -> None:
        self._speaks = place.local_rank == 0
        self._what, self._began, self._first, self._told = "", 0.0, 0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._began, self._first, self._told = what, now, done, now
        if self._speaks and now - self._told >= LINE_S and total:
            self._told = now
            log.info("%s", progress_line(what, done, total, (done - self._first) / (now - self._began)))


def reading(place: Place, folder: str, cache: str | None) -> tuple[WeightsCache | None, LoadProgress]:
    """How a rank reads a checkpoint: this node's copies, where there is a folder for them, and who is told of it."""
    told, warning = LoadProgress(place), None if cache else advice(Path(folder))
    if warning and place.local_rank == 0:
        log.warning("%s", warning)
    return (WeightsCache(Path(cache), told) if cache else None), told


def progress_line(what: str, done: int, total: int, rate: float) -> str:
    """One line; `rate` in bytes per second."""
    left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
    return f"{what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB ({100 * done / total:.0f} %), {rate / 1e6:.0f} MB/s{left}"


BUDGETS: Mapping[str, tuple[float, str]] = {
    "placing": (20.0, "whether the cluster has free cores or GPUs, and nodes that are still on their way"),
    "starting processes": (30.0, "the load of the node, and how fast its disk reads Python and torch"),
    "imports": (30.0, "how fast the node reads the Python environment: a local disk beats a shared one"),
    "building the kernels": (180.0, "the compiler; it is once per machine and version, later starts find the library"),
    "meeting the other ranks": (30.0, "that every node reaches rank 0's, and which rank came last"),
    "finding the model": (20.0, "the network to the Hugging Face hub: this node fetches what its cache lacks"),
    "reading weights": (
        20.0,
        "the disk or network behind it; placement.weights_cache keeps a copy on the node",
    ),
    "warming up": (30.0, "the load of the node: packing weights takes its memory's speed"),
    "making the key/value cache": (30.0, "the node's free memory"),
    "reading the saved state": (120.0, "the disk behind training.save_root"),
    "waiting for rank 0": (30.0, "rank 0's log"),
    "waiting for the run's folder": (20.0, "whether another job still trains in it"),
    "measuring the machine": (30.0, "the load of the node; peak_flops=... leaves the measurement out"),
}
"""Seconds of each part of a start, and what to look at where it took longer. Reading weights has more by size."""


def over_budget(where: object, seconds: Mapping[str, float], nbytes: int = 0) -> list[str]:
    """A line for each part that took longer than it should; `nbytes` are the rank's weights."""
    lines = []
    for name, took in seconds.items():
        budget, look = BUDGETS.get(name, (float("inf"), ""))
        budget += nbytes / RATE if name == "reading weights" else 0.0
        if took > budget:
            lines.append(f"{where}: {name} took {took:.1f} s, more than its budget of {budget:.0f} s; look at {look}")
    return lines
