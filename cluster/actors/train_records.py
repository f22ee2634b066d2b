"""What rank 0 writes down of a run while it trains; on the other ranks the same calls do nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.actors.train_spec import TrainSpec
from cluster.training.metrics import Records, TensorBoard
from cluster.training.run_folder import METRICS, SAMPLES, TENSORBOARD
from cluster.training.samples import Continuation


class RunRecords:
    """metrics.jsonl, samples.jsonl and TensorBoard's files, from the step on that a run goes on from."""

    def __init__(self, spec: TrainSpec, rank: int, step: int) -> None:
        self._spec, self._rank, self._step = spec, rank, step
        self._metrics: Records | None = None
        self._samples: Records | None = None
        self._board: TensorBoard | None = None

    def __enter__(self) -> Self:
        out = Path(self._spec.out)
        if self._rank == 0:
            self._metrics = Records(out / METRICS, self._step)
            if self._spec.samples.prompts:
                self._samples = Records(out / SAMPLES, self._step)
            if self._spec.tensorboard:
                self._board = TensorBoard(out / TENSORBOARD, self._step)
        return self

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for open_one in (self._metrics, self._samples, self._board):
            if open_one is not None:
                open_one.close()
