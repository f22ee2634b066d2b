"""The vocabulary divided over ranks: embedding, output head, and log-probabilities.

    VocabEmbedding   forward: one sum (one non-zero addend per element)            backward: none
    VocabHead        forward: none (local columns of the logits)                   backward: one reduction for dX
    .gather          one gather of logits        .argmax    one gather of [T, 2]
    .log_probs       a maximum, the tree of exponential sums, one exact sum

The vocabulary is never padded: shards are uneven where it does not divide. Logits are float32. The sum of
exponentials is taken leaf by leaf over the virtual shards, so a log-probability has the same bits at every tensor-
parallel size, gathered or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.layers.dropout import PLAIN, LayerPass
from parallel.layers.linear import ColumnLinear
from parallel.matmul.products import leaf_tree, uses_native
from parallel.native import step_kernels
from parallel.ranks.collectives import reduce_from
from parallel.ranks.group import Group
from parallel.sharding.released_weight import rows
from parallel.sharding.rules import Split, VirtualShards, sharded
from parallel.vocabulary.logsumexp import exp_sum_leaves, exp_sum_total, invariant_log, row_best, row_max


class VocabEmbedding(nn.Module):
    """Rows of the vocabulary divided over the ranks."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        group: Group,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.group, self.shards = group, group.shards(vocab_size)
        self.weight = sharded((vocab_size, d_model), Split(0, self.shards), group.rank, dtype, device)

    def forward(self, ids_T: Tensor) -> Tensor:
        """[T] ids to [T, D]."""
        if self.group.size == 1:
            return rows(self.weight, ids_T) + 0.0  # as a sum over ranks: -0.0 becomes 0.0
        start, stop = self.shards.range(self.group.rank)
        if start == stop:
            rows_TD = self.weight.sum() + self.weight.new_zeros((ids_T.shape[0], self.weight.shape[1]))
        elif uses_native(self.weight) and not (torch.is_grad_enabled() and self.weight.requires_grad):
            looked_up = rows(self.weight, step_kernels.shard_rows(ids_T, start, stop))
            rows_TD = step_kernels.own_rows(looked_up, ids_T, start, stop)
        else:
            mine_T = (ids_T >= start) & (ids_T < stop)
            rows_TD = rows(self.weight, (ids_T - start).clamp(0, stop - start - 1))
            rows_TD = torch.where(mine_T[:, None], rows_TD, torch.zeros((), dtype=rows_TD.dtype, device=rows_TD.device))
        return reduce_from(rows_TD, self.group)


@dataclass(frozen=True)
class Best:
    """The most likely token of each row and its logit (NaN where the row holds a NaN)."""

    ids: Tensor
    logits: Tensor


class VocabHead(nn.Module):
    """x W^T over this rank's rows of the vocabulary; the weight may be the embedding's."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        group: Group,
        weight: nn.Parameter | None = None,
        bias: bool = False,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.group, self.scale, self.vocab_size = group, scale, vocab_size
        self.shards = group.shards(vocab_size)
        meta = "meta" if weight is not None else device
        self.linear = ColumnLinear(d_model, self.shards, group=group, bias=bias, dtype=dtype, device=meta)
        if weight is not None:
            self.linear.weight = weight

    @property
    def weight(self) -> nn.Parameter:
        """[V/p, D], by the name that an embedding has for its own."""
        return self.linear.weight

    def forward(self, x_TD: Tensor, now: LayerPass = PLAIN) -> Tensor:
        """[T, V/p] float32 logits of this rank's part of the vocabulary."""
        logits = self.linear(x_TD, now, dtype=torch.float32)
        return logits if self.scale == 1.0 else logits * self.scale

    def gather(self, logits_local: Tensor) -> Tensor:
        """[T, V] on every rank."""
        if self.group.size == 1:
            return logits_local
        return self.group.talk.all_gather(logits_local.contiguous(), self.shards.sizes, 1)

    def gather_to_first(self, logits_local: Tensor) -> Tensor | None:
        """[T, V] on rank 0, None elsewhere."""
        if self.group.size == 1:
            return logits_local
        return self.group.talk.gather(logits_local.contiguous(), self.shards.sizes, 1)

    def argmax(self, logits_local: Tensor) -> Best:
        """The first of the largest logits of each row, on every rank, without gathering the logits."""
        rows = logits_local.shape[0]
        start, stop = self.shards.range(self.group.rank)
        if stop > start:
            values, ids = row_best(logits_local)
        else:
            values = logits_local.new_full((rows,), float("-inf"))
            ids = torch.zeros(rows, dtype=torch.long, device=logits_local.device)
        if self.group.size == 1:
            return Best(ids, values)
        pairs = torch.stack([values, (ids + start).float()], 1)  # ids are exact in float32 below 2^24
        everyone = self.group.talk.all_gather(pairs, [rows] * self.group.size, 0).view(self.group.size, rows, 2)
        best, owner = everyone[:, :, 0].max(0)
        return Best(everyone[owner, torch.arange(rows, device=owner.device), 1].long(), best)

    def log_probs(self, logits_local: Tensor, targets_T: Tensor, temperature: float = 1.0) -> Tensor:
        """[T] float32 log-probability of each row's target, on every rank."""
        scaled = logits_local if temperature == 1.0 else logits_local / temperature
        return target_logits(scaled, targets_T, self.shards, self.group) - log_normaliser(
            scaled, self.shards, self.group
        )

    def full_log_normaliser(self, logits_TV: Tensor) -> Tensor:
        """[T]: log sum exp over gathered logits, with the bits of the distributed one."""
        maximum = row_max(logits_TV)
        leaves = exp_sum_leaves(logits_TV, maximum, self.shards.borders)
        return maximum + invariant_log(exp_sum_total(leaves))


def log_normaliser(logits_local: Tensor, shards: VirtualShards, group: Group) -> Tensor:
    """[T] float32 log sum exp over the whole vocabulary. Collectives: a maximum and the tree of exponential sums."""
    maximum, total = max_and_exp_sum(logits_local, shards, group)
    return maximum + invariant_log(total)


def max_and_exp_sum(logits_local: Tensor, shards: VirtualShards, group: Group) -> tuple[Tensor, Tensor]:
    """[T] maximum and [T] sum of exp(logit - maximum), over the whole vocabulary."""
    maximum = row_max(logits_local)
    if group.size > 1:
        maximum = group.talk.all_reduce_max(maximum)
    leaves = exp_sum_leaves(logits_local, maximum, shards.local_borders(group.rank))
    if group.size == 1:
        return maximum, exp_sum_total(leaves)
    roots = leaf_tree(leaves.t().contiguous(), shards.local_nodes(group.rank))
    return maximum, group.talk.tree_sum(roots, shards.tree)


def target_logits(logits_local: Tensor, targets_T: Tensor, shards: VirtualShards, group: Group) -> Tensor:
    """[T] the logit of each row's target; one exact sum (one non-zero addend)."""
    start, stop = shards.range(group.rank)
    if stop > start:
        picked = logits_local.gather(1, (targets_T - start).clamp(0, stop - start - 1)[:, None])[:, 0]
        picked = torch.where(
            (targets_T >= start) & (targets_T < stop), picked, torch.zeros((), dtype=picked.dtype, device=picked.device)
        )
    else:
        picked = logits_local.new_zeros(logits_local.shape[0])
    return (group.talk.sum(picked) if group.size > 1 else picked) + 0.0
