"""The likeliest tokens of a row and their log-probabilities, over a vocabulary divided among the ranks.

    top_log_probs    the log-sum-exp's two collectives (vocab_parallel.py), and one gather of [T, 2 x count] to rank 0

Each rank sends its own `count` best, never its logits. The order is that of the logits, then of the token ids, and a
log-probability is a logit minus the log-sum-exp: the same bits at every tensor-parallel size. No backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from parallel.ranks.group import Group
from parallel.sharding.rules import VirtualShards
from parallel.vocabulary.vocab_parallel import log_normaliser

PIECE = 32
"""Columns whose maximum says whether one of the largest can be among them."""


@dataclass(frozen=True)
class Top:
    """[T, count] token ids, best first, and their log-probabilities; NaN throughout a row without a finite sum."""

    ids: Tensor
    log_probs: Tensor


def top_values(rows_RV: Tensor, count: int) -> Tensor:
    """[R, count] the largest values of each row, descending: all in the `count` pieces with the largest maxima."""
    pieces = rows_RV.shape[1] // PIECE
    if count > pieces // 4:
        return rows_RV.topk(count, 1).values
    body = rows_RV[:, : pieces * PIECE].unflatten(1, (pieces, PIECE))
    places = body.amax(2).topk(count, 1).indices
    found = body.gather(1, places[:, :, None].expand(-1, -1, PIECE)).flatten(1)
    return torch.cat([found, rows_RV[:, pieces * PIECE :]], 1).topk(count, 1).values


def row_top(x_TV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[T, count] the largest values of each row, descending, and their places; of equal ones the first places."""
    count = min(count, x_TV.shape[1])
    if count == 0:
        return x_TV[:, :0], torch.zeros((x_TV.shape[0], 0), dtype=torch.long, device=x_TV.device)
    above_TV = x_TV >= top_values(x_TV, count)[:, -1:]
    if not bool((above_TV.sum(1) == count).all()):  # equal values at the border, or NaN
        above_TV = _first_of_equals(x_TV, above_TV, count)
        if not bool((above_TV.sum(1) == count).all()):
            ordered = x_TV.sort(dim=1, descending=True, stable=True)
            return ordered.values[:, :count], ordered.indices[:, :count]
    ids = above_TV.nonzero()[:, 1].view(-1, count)
    ordered = x_TV.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return ordered.values, ids.gather(1, ordered.indices)


def _first_of_equals(x_TV: Tensor, above_TV: Tensor, count: int) -> Tensor:
    """Of values equal to the `count`-th largest the first ones, so that `count` are left. Without NaN, that is."""
    border_T1 = torch.where(above_TV, x_TV, float("inf")).amin(1, keepdim=True)
    greater_TV, equal_TV = x_TV > border_T1, x_TV == border_T1
    wanted_T1 = count - greater_TV.sum(1, keepdim=True)
    return greater_TV | (equal_TV & (equal_TV.cumsum(1) <= wanted_T1))


def top_log_probs(logits_local: Tensor, count: int, shards: VirtualShards, group: Group) -> Top | None:
    """The `count` likeliest tokens of each row on rank 0 (fewer only if the vocabulary is smaller), None elsewhere."""
    normaliser = log_normaliser(logits_local, shards, group)
    values, ids = row_top(logits_local, count)
    if group.size > 1:
        short = count - values.shape[1]  # a rank may own fewer columns, or none
        values = functional.pad(values, (0, short), value=float("-inf"))
        ids = functional.pad(ids + shards.range(group.rank)[0], (0, short))
        pairs = torch.cat([values, ids.float()], 1)  # ids are exact in float32 below 2^24
        everyone = group.talk.gather(pairs, [2 * count] * group.size, 1)
        if everyone is None:
            return None
        parts = everyone.view(-1, group.size, 2, count)
        values, ids = parts[:, :, 0].flatten(1), parts[:, :, 1].flatten(1).long()
        ordered = values.sort(dim=1, descending=True, stable=True)  # ranks own ascending ids
        most = min(count, shards.borders[-1])
        values, ids = ordered.values[:, :most], ids.gather(1, ordered.indices[:, :most])
    return Top(ids, values - normaliser[:, None])
