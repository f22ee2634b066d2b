"""Cross-entropy over a vocabulary divided among ranks.

Forward: three collectives (a maximum, the tree of exponential sums, the target's logit). Backward: none: each
rank's part of the gradient is softmax minus one-hot over its own columns. No rank ever holds a full row of logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.exact import ordered_sum
from parallel.ranks.group import Group
from parallel.sharding.rules import VirtualShards
from parallel.vocabulary.logsumexp import invariant_log, softmax_grad
from parallel.vocabulary.vocab_parallel import max_and_exp_sum, target_logits

IGNORE_INDEX = -100


def vocab_cross_entropy(
    logits_local: Tensor,
    targets_T: Tensor,
    shards: VirtualShards,
    group: Group,
) -> Tensor:
    """The mean of -log p(target) over the targets that are not IGNORE_INDEX; a scalar, equal on every rank.

    logits_local [T, V/p] float32, targets_T [T] global ids. NaN where no target is left, as torch, and then too every
    gradient is 0.
    """
    losses = vocab_token_losses(logits_local, targets_T, shards, group)
    return weighted_mean(losses, (targets_T != IGNORE_INDEX).float())


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """The sum of losses times weights over the sum of weights; what has no weight has no gradient, whatever its loss.

    Without any weight there is no mean: NaN, with gradients of 0 (0 / 0 would give NaN to every weight of a model).
    """
    total = ordered_sum(weights)
    terms = torch.where(weights != 0, losses, 0.0) * weights
    mean = ordered_sum(terms) / torch.where(total == 0, 1.0, total)
    return mean + torch.where(total == 0, torch.nan, 0.0)


def vocab_token_losses(logits_local: Tensor, targets_T: Tensor, shards: VirtualShards, group: Group) -> Tensor:
    """[T] float32 -log p(target) of each row, zero where ignored; differentiable with respect to the logits."""
    return _TokenLosses.apply(logits_local, targets_T, shards, group)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, shards: VirtualShards, group: Group) -> Tensor:  # type: ignore[no-untyped-def,override]
        kept = targets != IGNORE_INDEX
        targets = torch.where(kept, targets, torch.zeros_like(targets))
        maximum, total = max_and_exp_sum(logits, shards, group)
        log_prob = target_logits(logits, targets, shards, group) - (maximum + invariant_log(total))
        ctx.save_for_backward(logits, maximum, total, targets, kept)
        ctx.start, ctx.stop = shards.range(group.rank)
        return torch.where(kept, -log_prob, torch.zeros_like(log_prob))

    @staticmethod
    def backward(ctx, grad_T: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def,override]
        logits, maximum, total, targets, kept = ctx.saved_tensors
        mine = (targets >= ctx.start) & (targets < ctx.stop)
        columns = torch.where(mine, targets - ctx.start, -1)
        return softmax_grad(logits, maximum, total, columns, grad_T * kept), None, None, None
