"""A part of a corpus as an endless, shuffled sequence of pieces, and the packing of runs of them into rows.

Epoch e visits every piece once, in the order Permutation(size, seed, e). Rows are filled in that order: a row takes
pieces while they fit into `tokens_per_sample` whole, and ends with its epoch; so a row is a run of positions of one
epoch, a place between rows is (epoch, position), and going on from a place needs nothing of what came before. Rows are
never padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cluster.training.data.batches.batch import Batch
from cluster.training.data.batches.document_pieces import Ints, Pieces, PieceTable
from cluster.training.data.batches.eval_split import SplitRule
from cluster.training.data.batches.permutation import Permutation
from cluster.training.data.store.token_store import TokenStore
from parallel.vocabulary.cross_entropy import IGNORE_INDEX


@dataclass(frozen=True)
class Row:
    """A sample before it is read: positions start..stop of an epoch, their tokens and the number of learned targets."""

    epoch: int
    start: int
    stop: int
    num_tokens: int
    weight: int


class PackedDataset:
    """One part of a folder of tokens, cut to rows of `tokens_per_sample` and shuffled by `seed` (in corpus order if not
    `shuffle`).
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        tokens_per_sample: int,
        seed: int = 0,
        split: SplitRule = SplitRule(),
        part: str = "train",
        shuffle: bool = True,
    ) -> None:
        self.store, self.tokens_per_sample, self.seed, self.shuffle = store, tokens_per_sample, seed, shuffle
        self._table = PieceTable(store, tokens_per_sample, split, part)
        self.num_pieces = self._table.size
        self.identity: dict[str, Any] = {
            "tokenizer": store.tokenizer_fingerprint,
            "corpus": store.digest,
            "tokens_per_sample": tokens_per_sample,
            "seed": seed,
            "shuffle": shuffle,
            "split": split.to_json(),
            "part": part,
        }
        """What decides the sequence of rows; a saved place is good for a dataset with the same."""

    def pieces(self, epoch: int, start: int, stop: int) -> Pieces:
        """The pieces at positions start..stop of an epoch."""
        positions = np.arange(start, stop, dtype=np.int64)
        order = Permutation(self.num_pieces, self.seed, epoch)(positions) if self.shuffle else positions
        return self._table.take(order)

    def rows(self, epoch: int, start: int, count: int) -> list[Row]:
        """Up to `count` rows from position `start` of an epoch on; fewer only where the epoch ends, none at its end."""
        found: list[Row] = []
        window = 4 * count
        while start < self.num_pieces and len(found) < count:
            stop = min(self.num_pieces, start + window)
            pieces = self.pieces(epoch, start, stop)
            rows = self._fill(epoch, start, pieces, whole=stop == self.num_pieces)[: count - len(found)]
            found += rows
            start, window = (rows[-1].stop, window) if rows else (start, 2 * window)
        return found

    def _fill(self, epoch: int, start: int, pieces: Pieces, whole: bool) -> list[Row]:
        """The rows that a run of pieces makes; the last one, which the next piece might still join, only if the run is
        `whole`.
        """
        tokens, weights = _running(pieces.lengths), _running(pieces.weights)
        rows, first, count = [], 0, len(pieces.lengths)
        while first < count:
            stop = int(np.searchsorted(tokens, tokens[first] + self.tokens_per_sample, side="right")) - 1
            if stop == count and not whole:
                break
            num_tokens, weight = int(tokens[stop] - tokens[first]), int(weights[stop] - weights[first])
            rows.append(Row(epoch, start + first, start + stop, num_tokens, weight))
            first = stop
        return rows

    def read(self, rows: Sequence[Row], first_sample: int, all_rows: Sequence[Row]) -> Batch:
        """The tokens of `rows`, which are this rank's share of the global batch `all_rows`."""
        pieces = Pieces.joined([self.pieces(row.epoch, row.start, row.stop) for row in rows])
        starts, _, ends, learned_from = (np.repeat(numbers, pieces.lengths) for numbers in pieces)
        positions = np.arange(len(starts)) - np.repeat(_running(pieces.lengths)[:-1], pieces.lengths)
        places = starts + positions
        predicts = places + 1 < ends
        targets = np.where(predicts, self.store.read(np.minimum(places + 1, ends - 1)), IGNORE_INDEX)
        return Batch(
            token_ids=torch.from_numpy(self.store.read(places)),
            targets=torch.from_numpy(targets),
            positions=torch.from_numpy(positions),
            loss_weights=torch.from_numpy((predicts & (places + 1 >= learned_from)).astype(np.float32)),
            lengths=tuple(pieces.lengths.tolist()),
            sample_documents=tuple(row.stop - row.start for row in rows),
            first_sample=first_sample,
            global_samples=len(all_rows),
            global_tokens=sum(row.num_tokens for row in all_rows),
            global_weight=sum(row.weight for row in all_rows),
            documents=tuple((np.searchsorted(self.store.starts, pieces.starts, side="right") - 1).tolist()),
        )


def _running(values: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])
