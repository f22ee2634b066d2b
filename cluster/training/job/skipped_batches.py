"""What a run does about a batch whose loss or gradient is not finite: ends with its account, or leaves it out.

A batch that is left out is as if the data lacked it: no update, no step counted, the next one is taken in its place.
The count is part of the run's state; limits end a run that leaves out too many.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from cluster.training.data.batches.batch import Batch
from cluster.training.data.batches.data_state import DataState
from cluster.training.step.nonfinite_errors import BrokenUpdate, PoisonBatch

OnNonFinite = Literal["stop", "skip"]
NAMED = re.compile(r"step \d+, batch \d+ of the data")


@dataclass(frozen=True, kw_only=True)
class BatchPlace:
    """Which batch it was: where the run's data stood before it, and the samples of all replicas."""

    before: DataState
    samples: int

    def __str__(self) -> str:
        first = self.before.sample
        return (
            f"batch {self.before.batches + 1} of the data (epoch {self.before.epoch}, position {self.before.position}, "
            f"samples {first} to {first + self.samples - 1})"
        )

    @staticmethod
    def of(before: DataState, batch: Batch) -> BatchPlace:
        return BatchPlace(before=before, samples=batch.global_samples)


def names_batch(message: str) -> str | None:
    """Which step and batch ended a run, where its message blames one: the same again will end it again."""
    found = NAMED.search(message)
    return found[0] if found else None


class SkippedBatches:
    """One run's, the same on every rank. `total` goes into its checkpoints."""

    def __init__(self, action: OnNonFinite, most_in_a_row: int, most: int, total: int = 0) -> None:
        self._action, self._most_in_a_row, self._most = action, most_in_a_row, most
        self.total, self._in_a_row = total, 0

    def skip(self, step: int, place: BatchPlace, error: PoisonBatch) -> dict[str, Any]:
        """Counts a batch that is left out, as its record; raises where that is not wanted, or one too many."""
        what = f"step {step}, {place}: {error}; no weight was changed"
        if self._action == "stop":
            settings = isinstance(error.__cause__, BrokenUpdate)
            mend = "change the optimizer's settings" if settings else "mend the documents"
            raise PoisonBatch(f"{what}; {mend}, or set on_nonfinite=skip to leave such batches out")
        if self._in_a_row >= self._most_in_a_row:
            raise PoisonBatch(f"{what}; {self._in_a_row} before it were left out in a row (max_skipped_in_a_row)")
        if self.total >= self._most:
            raise PoisonBatch(f"{what}; {self.total} were left out before it (max_skipped)")
        self.total, self._in_a_row = self.total + 1, self._in_a_row + 1
        before = place.before
        return {
            "step": step, "batch": before.batches + 1, "epoch": before.epoch, "position": before.position,
            "samples": [before.sample, before.sample + place.samples], "what": str(error), "total": self.total,
        }  # fmt: skip

    def taken(self) -> dict[str, float]:
        """A step was applied; what its record says of those left out."""
        self._in_a_row = 0
        return {"skipped": self.total} if self.total else {}
