"""Which attention heads a rank owns, ALiBi slopes by global head, and the shared K/V head of multi-query attention.

Whole heads are dealt in virtual shards, so 25 heads over 2 ranks are 13 + 12 and a rank may own none. With one K/V
head every rank holds a copy of it; `share_heads` gives it to the local query heads, and its backward adds their
gradients over all ranks, head by head in the fixed tree, exactly once (one collective each for K and V).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.matmul.products import leaf_tree
from parallel.ranks.group import Group
from parallel.sharding.rules import VirtualShards


@dataclass(frozen=True)
class HeadLayout:
    """The heads of one attention layer: all of them, and those of this rank. `ids` are their numbers before some were
    pruned, where some were; those that remain are dealt anew.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    shards: VirtualShards
    rank: int
    ids: tuple[int, ...] | None = None

    @staticmethod
    def of(group: Group, n_heads: int, n_kv_heads: int, head_dim: int) -> HeadLayout:
        if n_heads < 1 or n_kv_heads not in (1, n_heads):
            raise ConfigError(
                f"{n_heads} attention heads with {n_kv_heads} key/value heads: only one shared key/value head or one "
                "per head is supported"
            )
        return HeadLayout(n_heads, n_kv_heads, head_dim, group.shards(n_heads), group.rank)

    @staticmethod
    def without(pruned: Sequence[int], group: Group, n_heads: int, head_dim: int) -> HeadLayout:
        """What is left of a layer with a key/value head per head; at least one must be."""
        ids = tuple(head for head in range(n_heads) if head not in set(pruned))
        if not ids or not set(pruned) <= set(range(n_heads)):
            raise ConfigError(
                f"pruned heads {sorted(pruned)} of a layer of {n_heads}: give numbers from 0 to {n_heads - 1}, and "
                "leave one"
            )
        return replace(HeadLayout.of(group, len(ids), len(ids), head_dim), ids=ids)

    @property
    def head_shards(self) -> VirtualShards:
        """The same cuts in elements (heads x head_dim)."""
        return self.shards.scaled(self.head_dim)

    @property
    def first(self) -> int:
        return self.shards.range(self.rank)[0]

    @property
    def n_local(self) -> int:
        return self.shards.local_size(self.rank)

    @property
    def n_local_kv(self) -> int:
        """One where it is shared (a copy on every rank), else one per local query head."""
        return 1 if self.shares_kv else self.n_local

    @property
    def shares_kv(self) -> bool:
        return self.n_kv_heads == 1 and self.n_heads > 1

    @property
    def local_ids(self) -> Sequence[int]:
        """The global numbers of this rank's heads."""
        owned = slice(self.first, self.first + self.n_local)
        return (range(self.n_heads) if self.ids is None else self.ids)[owned]


def alibi_slopes(n_heads: int, alibi_bias_max: float, head_ids: Sequence[int]) -> Tensor:
    """[len(head_ids)] float32 slopes of the given GLOBAL heads (Press et al. 2022; MPT's order for counts that are no
    power of two).
    """
    power = 2 ** math.ceil(math.log2(n_heads))
    exponents = torch.arange(1, power + 1, dtype=torch.float32) * (alibi_bias_max / power)
    slopes = 1.0 / torch.pow(2, exponents)
    if power != n_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:n_heads]
    return slopes[list(head_ids)].contiguous()


def share_heads(kv_T1H: Tensor, layout: HeadLayout, group: Group) -> Tensor:
    """The one K or V head as seen by the local query heads: [T, 1, H] without gradients, else an expanded view [T,
    n_local, H].
    """
    if not torch.is_grad_enabled() or not kv_T1H.requires_grad:
        return kv_T1H
    return _ShareHeads.apply(kv_T1H, layout, group)


class _ShareHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv: Tensor, layout: HeadLayout, group: Group) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.layout, ctx.group = layout, group
        return kv.expand(-1, layout.n_local, -1)

    @staticmethod
    def backward(ctx, grad_TNH: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def,override]
        shards, rank = ctx.layout.shards, ctx.group.rank
        leaves = _leaf_sums(grad_TNH.float(), shards.local_borders(rank))
        roots = leaf_tree(leaves, shards.local_nodes(rank))
        if ctx.group.size == 1:
            total = roots[0].to(grad_TNH.dtype)
        else:
            total = ctx.group.talk.tree_sum(roots, shards.tree, dtype=grad_TNH.dtype)
        return total[:, None, :], None, None


def _leaf_sums(grad_TNH: Tensor, borders: Sequence[int]) -> Tensor:
    """[leaves, T, H]: each leaf's heads added one after another, in ascending order."""
    leaves = grad_TNH.new_zeros((len(borders) - 1, grad_TNH.shape[0], grad_TNH.shape[2]))
    for leaf, (start, stop) in enumerate(itertools.pairwise(borders)):
        for head in range(start, stop):
            leaves[leaf] += grad_TNH[:, head]
    return leaves
