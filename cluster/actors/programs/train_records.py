"""What rank 0 writes down of a run while it trains; on the other ranks the same calls do nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.actors.programs.train_spec import TrainSpec
from cluster.training.job.run_folder import METRICS, SAMPLES, SKIPPED, TENSORBOARD
from cluster.training.job.run_metrics import Records, TensorBoard
from cluster.training.job.sample_text import Continuation

log = logging.getLogger(__name__)


class RunRecords:
    """metrics.jsonl, samples.jsonl and TensorBoard's files, from the step on that a run goes on from."""

    def __init__(self, spec: TrainSpec, rank: int, step: int) -> None:
        out = Path(spec.out)
        self._metrics = Records(out / METRICS, step) if rank == 0 else None
        self._samples = Records(out / SAMPLES, step) if rank == 0 and spec.samples.prompts else None
        self._skipped = Records(out / SKIPPED, step) if rank == 0 and spec.on_nonfinite == "skip" else None
        self._board = TensorBoard(out / TENSORBOARD, step) if rank == 0 and spec.tensorboard else None

    def step(self, record: Mapping[str, float]) -> None:
        """A step's numbers."""
        if self._metrics is not None:
            self._metrics.write(record)
        if self._board is not None:
            self._board.write(record)

    def samples(self, step: int, continuations: Sequence[Continuation]) -> None:
        """What the model made of its prompts after a step."""
        for index, continuation in enumerate(continuations):
            record = {"step": step, "index": index, **continuation.record()}
            if self._samples is not None:
                self._samples.write(record)
            if self._board is not None:
                self._board.write_sample(record)

    def skipped(self, record: Mapping[str, Any]) -> None:
        """A batch that was left out."""
        if self._skipped is not None:
            self._skipped.write(record)
            log.warning("batch %d is left out at step %d: %s", record["batch"], record["step"], record["what"])

    def close(self) -> None:
        for each in (self._metrics, self._samples, self._skipped, self._board):
            if each is not None:
                each.close()
