"""The pieces of a log-sum-exp over vocabulary leaves, each the same bits wherever a row or a leaf stands.

Native kernels where they exist; torch otherwise (then a row's bits may depend on its place in the batch). No
collectives here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.matmul.products import uses_native
from parallel.native import elementwise
from parallel.sharding.tree import leaves_sum


def row_max(logits_TV: Tensor) -> Tensor:
    """[T]; minus infinity where a rank owns no part of the vocabulary."""
    if logits_TV.shape[1] == 0:
        return logits_TV.new_full((logits_TV.shape[0],), float("-inf"))
    return elementwise.row_max(logits_TV) if uses_native(logits_TV) else logits_TV.amax(1)


def row_best(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """[T] the largest logit of each row, NaN where there is one, and [T] the first place where it stands."""
    if logits_TV.device.type == "cpu" and logits_TV.dtype is torch.float32:  # numpy's is ten times as fast
        ids = torch.from_numpy(logits_TV.detach().numpy().argmax(1))
        return logits_TV.gather(1, ids[:, None])[:, 0], ids
    best = logits_TV.max(1)
    return best.values, best.indices


def exp_sum_leaves(logits_TV: Tensor, maximum_T: Tensor, borders: Sequence[int]) -> Tensor:
    """[T, leaves]: sum of exp(logit - maximum) over the columns of each leaf."""
    if uses_native(logits_TV) and logits_TV.shape[1]:
        return elementwise.exp_sum(logits_TV, maximum_T, tuple(borders))
    leaves = [torch.exp(logits_TV[:, lo:hi] - maximum_T[:, None]).sum(1) for lo, hi in itertools.pairwise(borders)]
    return torch.stack(leaves, 1) if leaves else logits_TV.new_zeros((logits_TV.shape[0], 0))


def exp_sum_total(leaves_TL: Tensor) -> Tensor:
    """[T]: the leaves added in the fixed tree."""
    return leaves_sum(leaves_TL.unbind(1))


def invariant_log(x_T: Tensor) -> Tensor:
    return elementwise.log(x_T.contiguous()) if uses_native(x_T) else torch.log(x_T)


def softmax_grad(logits_TV: Tensor, maximum_T: Tensor, total_T: Tensor, columns_T: Tensor, scales_T: Tensor) -> Tensor:
    """[T, V]: (softmax - one-hot) * scale of each row; a column below 0 is not among these."""
    if uses_native(logits_TV):
        return elementwise.softmax_grad(logits_TV, maximum_T, total_T, columns_T, scales_T)
    grad = torch.exp(logits_TV - maximum_T[:, None]) / total_T[:, None]
    rows = (columns_T >= 0).nonzero()[:, 0]
    grad[rows, columns_T[rows]] -= 1.0
    return grad * scales_T[:, None]


def invariant_exp(x: Tensor) -> Tensor:
    return elementwise.exp(x.contiguous()) if uses_native(x) else torch.exp(x)
