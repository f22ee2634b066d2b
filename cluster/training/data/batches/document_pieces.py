"""Documents cut into pieces of at most one row, and which of them a part of the split has.

    document of n tokens, rows of T:   piece j has tokens [j*T, min((j+1)*T, n)),   j < max(1, ceil((n - 1) / T))

Every token but the first is a target once: where a piece ends before its document, its last target is the token after
it. A last token that would be alone in a piece is a target only. Pieces in which nothing is learned (all prompt) are
left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.training.data.batches.eval_split import PARTS, SplitRule
from cluster.training.data.corpus.document import DataError, NothingHeldOut
from cluster.training.data.store.token_store import TokenStore
from parallel.errors import ConfigError

Ints = NDArray[np.int64]


class Pieces(NamedTuple):
    """Some pieces: where each starts in the tokens, how many it has, where its document ends, the first token of it
    that is learned.
    """

    starts: Ints
    lengths: Ints
    ends: Ints
    learned_from: Ints

    @staticmethod
    def joined(runs: Sequence[Pieces]) -> Pieces:
        """Runs of pieces end to end."""
        nothing = np.empty(0, np.int64)
        return Pieces(
            *(np.concatenate([nothing, *(run[field] for run in runs)]) for field in range(len(Pieces._fields)))
        )

    @property
    def weights(self) -> Ints:
        """How many targets of each piece are learned: those in [start + 1, start + length] within the document and
        after the prompt.
        """
        last = np.minimum(self.starts + self.lengths, self.ends - 1)
        return np.maximum(0, last - np.maximum(self.starts + 1, self.learned_from) + 1)


class PieceTable:
    """The pieces of one part of a corpus, numbered 0 to size - 1 in the order of the corpus. About 12 bytes of memory
    for each.
    """

    def __init__(self, store: TokenStore, tokens_per_sample: int, split: SplitRule, part: str) -> None:
        if tokens_per_sample < 2:
            raise ConfigError(f"tokens_per_sample {tokens_per_sample} leaves nothing to predict; give at least 2")
        if part not in PARTS:
            raise ConfigError(f"part {part!r} of the data is unknown; choose one of {list(PARTS)}")
        self.store, self.tokens_per_sample = store, tokens_per_sample
        lengths = np.diff(store.starts).astype(np.int64)
        counts = np.maximum(1, -(-(lengths - 1) // tokens_per_sample))
        self._first = np.concatenate([[0], np.cumsum(counts)])  # the number of each document's first piece
        self._kept = self._select(counts, split, part)
        self.size = len(self._kept)
        if self.size == 0:
            kind = NothingHeldOut if part == "eval" else DataError
            raise kind(
                f"{store.folder}: none of its {store.num_documents} documents is in the {part!r} part at "
                f"corpus.split.eval_fraction={split.eval_fraction:g}, corpus.split.seed={split.seed}; change these, or "
                "cut the corpus into more documents with corpus.separator, or set corpus.split.unit=piece"
            )

    def _select(self, counts: Ints, split: SplitRule, part: str) -> NDArray[np.unsignedinteger]:
        total = int(self._first[-1])
        numbers: NDArray[np.unsignedinteger] = np.arange(total, dtype=np.uint32 if total < 1 << 32 else np.uint64)
        kept = np.ones(total, np.bool_)
        if self.store.prompts is not None:
            kept = self._of(numbers.astype(np.int64)).weights > 0
        if split.eval_fraction > 0.0 or part == "eval":
            in_document = numbers.astype(np.int64) - np.repeat(self._first[:-1], counts)
            held_out = split.in_eval(np.repeat(self.store.hashes, counts), in_document.astype(np.uint64))
            kept &= held_out if part == "eval" else ~held_out
        return numbers[kept]

    def take(self, indices: Ints) -> Pieces:
        """The pieces with these numbers."""
        return self._of(self._kept[indices].astype(np.int64))

    def _of(self, numbers: Ints) -> Pieces:
        documents = np.searchsorted(self._first, numbers, side="right") - 1
        origins = self.store.starts[documents].astype(np.int64)
        ends = self.store.starts[documents + 1].astype(np.int64)
        starts = origins + (numbers - self._first[documents]) * self.tokens_per_sample
        lengths = np.minimum(self.tokens_per_sample, ends - starts)
        prompts = 0 if self.store.prompts is None else self.store.prompts[documents].astype(np.int64)
        return Pieces(starts, lengths, ends, origins + prompts)
