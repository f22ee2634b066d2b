"""A batch as the trainer takes it: whole sequences in one row, what each position should learn; its micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from parallel.layers.dropout import token_keys


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskTargets:
    """What a head should learn of whole sequences: labels [S], [S, C], spans [S, 2], or one per token [T]; of double
    heads [S], 1 for the right choice. `weights`: of each addend. `marks` [S]: double heads, cls_index.
    """

    labels: Tensor
    weights: Tensor
    normaliser: float
    per_token: bool = False
    num_choices: int = 1
    marks: Tensor | None = None

    def cut(self, tokens: slice, sequences: slice) -> TaskTargets:
        own = tokens if self.per_token else sequences
        marks = None if self.marks is None else self.marks[sequences]
        return replace(self, labels=self.labels[own], weights=self.weights[own], marks=marks)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainBatch:
    """Whole sequences, packed. targets: the token each position should predict, -100 where nothing is learned."""

    token_ids: Tensor  # [T] int64
    targets: Tensor  # [T] int64
    weights: Tensor  # [T] float32
    lengths: tuple[int, ...]
    normaliser: float  # of the global batch: its sum of weights (dpo: its number of pairs)
    old_logprobs: Tensor | None = None  # [T], at the position that predicts the token
    advantages: Tensor | None = None
    reference_logprobs: Tensor | None = None
    task: TaskTargets | None = None  # of a model with a head, for the loss "task"
    keys: Tensor | None = None  # [T] int64, by which dropout masks are drawn; None: by sequence here and place in it

    def parts(self, max_tokens: int | None, sequences_together: int = 1) -> Iterator[TrainBatch]:
        """Micro-batches of at most max_tokens tokens (or one unit, if that is longer); units of sequences stay
        together.
        """
        start, first = 0, 0
        while first < len(self.lengths):
            last, stop = first, start
            while last < len(self.lengths):
                unit = sum(self.lengths[last : last + sequences_together])
                if last > first and max_tokens is not None and stop + unit - start > max_tokens:
                    break
                last, stop = last + sequences_together, stop + unit
            yield self._cut(start, stop, slice(first, last))
            first, start = last, stop

    def _cut(self, start: int, stop: int, own: slice) -> TrainBatch:
        names = ("token_ids", "targets", "weights", "old_logprobs", "advantages", "reference_logprobs", "keys")
        cut = {name: None if getattr(self, name) is None else getattr(self, name)[start:stop] for name in names}
        task = self.task.cut(slice(start, stop), own) if self.task else None
        return TrainBatch(lengths=self.lengths[own], normaliser=self.normaliser, task=task, **cut)  # type: ignore[arg-type]


def keyed(batch: TrainBatch, dropout_seed: int | None) -> TrainBatch:
    """With the keys that dropout masks are drawn by, where any are needed: parts of it drop what the whole does."""
    if dropout_seed is None or batch.keys is not None:
        return batch
    return replace(batch, keys=token_keys(range(len(batch.lengths)), batch.lengths).to(batch.token_ids.device))


def together(batch: TrainBatch, loss: str) -> int:
    """How many sequences in turn make one addend of a loss."""
    return batch.task.num_choices if batch.task else 2 if loss == "dpo" else 1
