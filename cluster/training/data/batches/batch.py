"""A batch as the model's forward takes it: one flat row of tokens, with the lengths of the documents that attention
must not cross.

A sample is one packed row; a batch is a run of samples, which `samples` and `split` take apart again at their borders.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from parallel.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Packed samples. A target is the token after it in its document, -100 at a document's last; positions restart with
    each piece.
    """

    token_ids: Tensor  # [T] int64
    targets: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    loss_weights: Tensor  # [T] float32, zero where there is nothing to learn
    lengths: tuple[int, ...]  # tokens of each document (or piece of one); they add up to T
    sample_documents: tuple[int, ...]  # documents of each sample; they add up to len(lengths)
    first_sample: int  # the number, counted over the whole run and all ranks, of the first sample here
    global_samples: int  # of the batch all dp ranks share: its samples, tokens and sum of loss weights
    global_tokens: int
    global_weight: int
    labels: Tensor | None = None  # [documents] int64: the class of each, where texts are classified
    documents: tuple[int, ...] = ()  # where each is in the corpus: the document's number there, from 0

    @property
    def num_samples(self) -> int:
        return len(self.sample_documents)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def samples(self, start: int, stop: int) -> Batch:
        """Samples start..stop of this batch, for a micro-batch: views, not copies."""
        borders = [0]
        for count in self.sample_documents:
            borders.append(borders[-1] + count)
        first, last = borders[start], borders[stop]
        begin, end = sum(self.lengths[:first]), sum(self.lengths[:last])
        return Batch(
            token_ids=self.token_ids[begin:end],
            targets=self.targets[begin:end],
            positions=self.positions[begin:end],
            loss_weights=self.loss_weights[begin:end],
            lengths=self.lengths[first:last],
            sample_documents=self.sample_documents[start:stop],
            first_sample=self.first_sample + start,
            global_samples=self.global_samples,
            global_tokens=self.global_tokens,
            global_weight=self.global_weight,
            labels=None if self.labels is None else self.labels[first:last],
            documents=self.documents[first:last],
        )

    def split(self, samples_each: int) -> list[Batch]:
        """Micro-batches of so many samples, the last of what is left; none for a rank without samples."""
        if samples_each < 1:
            raise ConfigError(f"a micro-batch of {samples_each} samples; give at least 1")
        count = self.num_samples
        return [self.samples(start, min(count, start + samples_each)) for start in range(0, count, samples_each)]
