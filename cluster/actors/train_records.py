"""What rank 0 writes down of a run while it trains; on the other ranks the same calls do nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.actors.train_spec import TrainSpec
from cluster.training.metrics import Records, TensorBoard
from cluster.training.run_folder import METRICS, SAMPLES, TENSORBOARD
from cluster.training.samples import Continuation


class RunRecords:
    """metrics.jsonl, samples.jsonl and TensorBoard's files, from the step on that a run goes on from."""

    def __init__(self, spec: TrainSpec, rank: int, step: int) -> None:
        out = Path(spec.out)
        self._metrics = Records(out / METRICS, step) if rank == 0 else None
        self._samples = Records(out / SAMPLES, step) if rank == 0 and spec.samples.prompts else None
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

    def close(self) -> None:
        for each in (self._metrics, self._samples, self._board):
            if each is not None:
                each.close()
