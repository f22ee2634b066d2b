"""A padded [batch, time] call as flat tokens: which of its tokens are there, where they go, what positions they have.

Padding is whatever attention_mask hides, on the left, on the right or in between: it is never computed, and its places
in a result hold zeros. A row may have no token at all. Knows no model. B batch, T new and P past columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from parallel.errors import RequestError


@dataclass(frozen=True, eq=False)
class Padding:
    """The columns of each row that hold tokens, bool: those handed in now, and those of the past before them."""

    new_BT: Tensor
    past_BP: Tensor

    @staticmethod
    def of(mask: Tensor | None, batch: int, time: int, past: int, device: torch.device) -> Padding:
        """From attention_mask, which covers past and new columns; without one all are there."""
        if mask is None:
            here = torch.ones((batch, past + time), dtype=torch.bool, device=device)
        else:
            here = checked_mask("attention_mask", mask, (batch, past + time)).to(device)
        padding = Padding(here[:, past:], here[:, :past])
        if not padding.rows:
            raise RequestError("attention_mask hides every token of the batch; leave at least one")
        return padding

    @cached_property
    def index_T(self) -> Tensor:
        """Where the new tokens lie in a padded tensor whose first two axes are one."""
        return self.new_BT.flatten().nonzero()[:, 0]

    @cached_property
    def rows(self) -> list[int]:
        """The rows that bring tokens, which are the sequences of the flat row."""
        return self.new_BT.any(1).nonzero()[:, 0].tolist()

    @cached_property
    def lengths(self) -> list[int]:
        return self.new_BT.sum(1)[self.rows].tolist()

    @cached_property
    def past_lengths(self) -> list[int]:
        return self.past_BP.sum(1)[self.rows].tolist()

    @cached_property
    def columns(self) -> list[Tensor]:
        """For each sequence the columns of its tokens, past and new."""
        here = torch.cat((self.past_BP, self.new_BT), 1)
        return [here[row].nonzero()[:, 0] for row in self.rows]

    @property
    def gaps(self) -> bool:
        """Whether something is hidden between two tokens of a row."""
        return any(int(columns[-1] - columns[0]) + 1 != len(columns) for columns in self.columns)

    def positions(self) -> Tensor:
        """[T] the columns counted from the first token of the row."""
        here = torch.cat((self.past_BP, self.new_BT), 1)
        first_B1 = here.int().argmax(1, keepdim=True)
        columns_T = torch.arange(self.past_BP.shape[1], here.shape[1], device=here.device)
        return self.pack(columns_T[None] - first_B1)

    def pack(self, x_BT: Tensor) -> Tensor:
        """The flat row [tokens, ...] of a padded tensor [B, T, ...]."""
        return x_BT.flatten(0, 1).index_select(0, self.index_T)

    def pad(self, x_T: Tensor) -> Tensor:
        """The padded tensor [B, T, ...] of a flat row; zeros where nothing is."""
        batch, time = self.new_BT.shape
        whole = x_T.new_zeros((batch * time, *x_T.shape[1:]))
        return whole.index_copy(0, self.index_T, x_T).unflatten(0, (batch, time))

    def pack_past(self, x_BKPH: Tensor) -> Tensor:
        """The past of the sequences, [past tokens, K, H], one after another."""
        here = self.past_BP[self.rows]
        return x_BKPH[self.rows].transpose(1, 2)[here]

    @property
    def queries(self) -> list[Tensor]:
        """For each sequence the columns of its new tokens, counted from the first new one."""
        return [self.new_BT[row].nonzero()[:, 0] for row in self.rows]

    def pad_weights(self, weights: Sequence[Tensor], keys: Sequence[Tensor], num_columns: int) -> Tensor:
        """[B, N, T, columns]: each sequence's probabilities [N, Q, C] at its queries' and its `keys`' columns."""
        empty = weights[0].new_zeros((weights[0].shape[0], self.new_BT.shape[1], num_columns))
        placed = [empty] * len(self.new_BT)
        for row, own_NQC, queries_Q, keys_C in zip(self.rows, weights, self.queries, keys, strict=True):
            wide = own_NQC.new_zeros((*own_NQC.shape[:2], num_columns)).index_copy(2, keys_C, own_NQC)
            placed[row] = empty.index_copy(1, queries_Q, wide)
        return torch.stack(placed)


@dataclass(frozen=True, eq=False)
class EncoderPadding:
    """Which states of a padded encoder output [B, S, D] the rows' tokens see: `seen_BQS` has a row for every new column
    or one for all (Q = 1). With `whole`, what nothing sees is computed all the same: a later call of the same cache may
    see it.
    """

    padding: Padding
    seen_BQS: Tensor
    whole: bool

    @staticmethod
    def of(mask: Tensor | None, num_states: int, padding: Padding, whole: bool) -> EncoderPadding:
        """From encoder_attention_mask, [B, S] or [B, T, S]; without one all states are seen."""
        batch, time = padding.new_BT.shape
        if mask is None:
            seen = torch.ones((batch, 1, num_states), dtype=torch.bool, device=padding.new_BT.device)
        else:
            shape = (batch, time, num_states) if mask.dim() == 3 else (batch, num_states)
            seen = checked_mask("encoder_attention_mask", mask, shape).to(padding.new_BT.device)
            seen = seen if mask.dim() == 3 else seen[:, None]
        found = EncoderPadding(padding, seen, whole)
        if any(not bool(found.seen[row].any(1).all()) for row in padding.rows):
            raise RequestError("encoder_attention_mask hides every encoder state from a token; leave it at least one")
        return found

    @cached_property
    def query_lengths(self) -> list[int]:
        """New tokens of every row of the batch, those without any among them."""
        return self.padding.new_BT.sum(1).tolist()

    @cached_property
    def seen(self) -> list[Tensor]:
        """For each row of the batch which states its tokens see, [1 or queries, S]."""
        if self.seen_BQS.shape[1] == 1:
            return list(self.seen_BQS)
        return [own_QS[new_T] for own_QS, new_T in zip(self.seen_BQS, self.padding.new_BT, strict=True)]

    @cached_property
    def columns(self) -> list[Tensor]:
        """For each row the columns of the states that are computed."""
        everything = torch.arange(self.seen_BQS.shape[2], device=self.seen_BQS.device)
        if self.whole:
            return [everything] * len(self.seen)
        pairs = zip(self.seen, self.query_lengths, strict=True)
        return [everything[own_QS.any(0)] if queries else everything[:0] for own_QS, queries in pairs]

    @property
    def lengths(self) -> list[int]:
        return [len(columns) for columns in self.columns]

    @property
    def hidden(self) -> list[Tensor]:
        """Of those, [1 or queries, C] which are hidden."""
        return [~own_QS[:, columns] for own_QS, columns in zip(self.seen, self.columns, strict=True)]

    @cached_property
    def index_S(self) -> Tensor:
        """Where they lie in a padded tensor whose first two axes are one."""
        num_states = self.seen_BQS.shape[2]
        return torch.cat([row * num_states + columns for row, columns in enumerate(self.columns)])

    def pack(self, x_BS: Tensor) -> Tensor:
        """The flat states [sum of lengths, ...] of a padded tensor [B, S, ...]."""
        return x_BS.flatten(0, 1).index_select(0, self.index_S)

    def pad(self, x_S: Tensor) -> Tensor:
        """The padded tensor [B, S, ...] of flat states; zeros where nothing is."""
        batch, _, num_states = self.seen_BQS.shape
        whole = x_S.new_zeros((batch * num_states, *x_S.shape[1:]))
        return whole.index_copy(0, self.index_S, x_S).unflatten(0, (batch, num_states))


def checked_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask as bool; refused unless it has the shape and holds zeros and ones."""
    if tuple(mask.shape) != shape:
        raise RequestError(
            f"{name} of shape {list(mask.shape)}; it is {list(shape)} here: a number for every column, past ones first"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise RequestError(f"{name} holds other numbers than 0 (padding) and 1 (a token)")
    return mask == 1
