"""Deals the samples of a dataset to the data-parallel ranks, batch by batch, and knows where it stands.

The order of samples is the dataset's. A batch is the next `batch_size` of them, and dp rank r takes the r-th run of it,
[B*r // dp, B*(r+1) // dp): neither dp, nor micro-batches, nor stopping and resuming change which samples a batch has.
Ranks of one tp group pass the same dp_rank and get the same. Nothing is communicated: every rank packs the whole batch
(numbers only) and reads its own share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from cluster.training.data.batches.batch import Batch
from cluster.training.data.batches.data_state import Dataset, DataState
from cluster.training.data.batches.packing import Row
from parallel.errors import ConfigError


class RowDataset(Dataset, Protocol):
    """Rows in the order of an epoch, and what is in some of them."""

    def rows(self, epoch: int, start: int, count: int) -> list[Row]: ...

    def read(self, rows: Sequence[Row], first_sample: int, all_rows: Sequence[Row]) -> Batch: ...


class Loader:
    """An iterator over this rank's batches. `state` is the place after the last batch: save it with the step that used
    that batch.

    Endless unless `epochs` is given; then the last batch may be short, and a rank's share of it empty.
    """

    def __init__(
        self,
        dataset: RowDataset,
        state: DataState | None = None,
        *,
        batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        epochs: int | None = None,
    ) -> None:
        if not 0 <= dp_rank < dp_size:
            raise ConfigError(
                f"dp_rank {dp_rank} is outside {dp_size} data-parallel ranks; ranks run from 0 to dp_size - 1"
            )
        if batch_size < dp_size:
            raise ConfigError(
                f"batch_size {batch_size} is less than the {dp_size} data-parallel ranks; each needs a sample: raise "
                "batch_size"
            )
        self.dataset, self.batch_size, self.epochs = dataset, batch_size, epochs
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.state = DataState.start(dataset) if state is None else state
        self.state.check(dataset)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        before = self.state
        rows, self.state = self._advance(before)
        start = len(rows) * self.dp_rank // self.dp_size
        stop = len(rows) * (self.dp_rank + 1) // self.dp_size
        return self.dataset.read(rows[start:stop], before.sample + start, rows)

    def skip(self, batches: int) -> None:
        """Pass over batches without reading them."""
        for _ in range(batches):
            self.state = self._advance(self.state)[1]

    def _advance(self, state: DataState) -> tuple[list[Row], DataState]:
        """The rows of the batch at a place, and the place after it; StopIteration where there are none."""
        rows: list[Row] = []
        epoch, position = state.epoch, state.position
        while len(rows) < self.batch_size and (self.epochs is None or epoch < self.epochs):
            rows += self.dataset.rows(epoch, position, self.batch_size - len(rows))
            position = rows[-1].stop
            if position == self.dataset.num_pieces:
                epoch, position = epoch + 1, 0
        if not rows:
            raise StopIteration
        sample, batches = state.sample + len(rows), state.batches + 1
        return rows, replace(state, epoch=epoch, position=position, sample=sample, batches=batches)
