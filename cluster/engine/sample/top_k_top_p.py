"""Which tokens may be drawn: top-k, top-p, min-p, in transformers' order, on rows of scaled logits.

Each cut is a lowest logit that is kept, so tokens that tie with the last one kept are kept too, and nothing depends
on the order in which a sort leaves equal values. Candidates for top-k and top-p are found through the maxima of short
pieces of the row, which is several times cheaper than sorting 50,000 logits.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor
from torch.nn import functional

from cluster.engine.request import SamplingParams
from parallel import exact
from parallel.vocabulary.logsumexp import exp_sum_leaves, invariant_exp
from parallel.vocabulary.top_tokens import top_values

FIRST_CANDIDATES = 256
BINS, BINS_PER_UNIT = 512, 16
"""Bins of logits: 16 to a unit, the last one for everything below -32."""
LEAF = 512
"""Columns whose exponentials are summed together."""


def leaf_borders(vocab_size: int) -> tuple[int, ...]:
    return (*range(0, vocab_size, LEAF), vocab_size)


def leaf_sums(rows_RV: Tensor) -> Tensor:
    """[R, leaves] float64 sums of exp over leaves of rows whose largest value is 0."""
    rows, vocab_size = rows_RV.shape
    if rows_RV.is_cuda:  # one kernel for all leaves
        padded = functional.pad(rows_RV.double().exp(), (0, -vocab_size % LEAF))
        return padded.view(rows, -1, LEAF).sum(2)
    zero = torch.zeros(rows, dtype=torch.float32)
    return exp_sum_leaves(rows_RV, zero, leaf_borders(vocab_size)).double()


def cut(rows_RV: Tensor, params: Many[SamplingParams]) -> None:
    """Sets what must not be drawn to minus infinity, in place. The largest value of every row is 0."""
    vocab_size = rows_RV.shape[1]
    top_k = [i for i, given in enumerate(params) if given.top_k is not None and given.top_k < vocab_size]
    if top_k:
        _keep(rows_RV, top_k, top_k_floor(picked(rows_RV, top_k), [params[i].top_k or 0 for i in top_k]))
    top_p = [i for i, given in enumerate(params) if given.top_p is not None and given.top_p < 1.0]
    if top_p:
        _keep(rows_RV, top_p, top_p_floor(picked(rows_RV, top_p), [params[i].top_p or 1.0 for i in top_p]))
    min_p = [i for i, given in enumerate(params) if given.min_p]
    if min_p:
        floors = [exact.log(params[i].min_p or 1.0) for i in min_p]
        _keep(rows_RV, min_p, torch.tensor(floors, dtype=torch.float32, device=rows_RV.device))


def picked(rows_RV: Tensor, places: list[int]) -> Tensor:
    """Those rows; no copy if they are all rows."""
    return rows_RV if len(places) == rows_RV.shape[0] else rows_RV[places]


def _keep(rows_RV: Tensor, places: list[int], floor: Tensor) -> None:
    """Minus infinity where a row lies below its floor."""
    chosen = picked(rows_RV, places)
    chosen.masked_fill_(chosen < floor[:, None], float("-inf"))
    if chosen is not rows_RV:
        rows_RV[places] = chosen


def top_k_floor(rows_RV: Tensor, counts: list[int]) -> Tensor:
    """[R] the k-th largest value of each row."""
    largest = top_values(rows_RV, max(counts))
    last_R1 = torch.tensor(counts, device=rows_RV.device)[:, None] - 1
    return largest.gather(1, last_R1)[:, 0]


def top_p_floor(rows_RV: Tensor, shares: list[float]) -> Tensor:
    """[R] the lowest value of the smallest set of most likely tokens that holds the share.

    A token is kept if those before it hold less. Looked for among the most likely few first; a row whose share is
    spread over more is divided into bins instead of being sorted.
    """
    device = rows_RV.device
    wanted = exact.ordered_sum(leaf_sums(rows_RV), 1) * torch.tensor(shares, dtype=torch.float64, device=device)
    values = top_values(rows_RV, min(FIRST_CANDIDATES, rows_RV.shape[1]))
    mass = invariant_exp(values).double().cumsum(1)
    reached = mass >= wanted[:, None]
    floors = values[torch.arange(len(shares), device=device), reached.int().argmax(1)]
    for i in (~reached[:, -1]).nonzero()[:, 0].tolist():
        floors[i] = _floor_by_bins(rows_RV[i], shares[i])
    return floors


def _floor_by_bins(row_V: Tensor, share: float) -> Tensor:
    """As top_p_floor, for one row: masses of narrow bins of logits, then a sort inside the one bin that decides."""
    bins = (row_V * -BINS_PER_UNIT).clamp_(max=BINS - 1).long()
    sums = torch.bincount(bins, invariant_exp(row_V).double(), BINS).cumsum(0)
    wanted = sums[-1] * share
    chosen = int(torch.searchsorted(sums, wanted).clamp_(max=BINS - 1))
    inside = row_V[bins == chosen].sort(descending=True).values
    mass = invariant_exp(inside).double().cumsum(0) + (sums[chosen - 1] if chosen else 0.0)
    reached = (mass >= wanted).int()
    reached[-1] = 1
    return inside[reached.argmax()]
