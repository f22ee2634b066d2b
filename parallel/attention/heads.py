"""Which attention heads a rank owns, ALiBi slopes by global head, and key/value heads that several query heads share.

Whole query heads are dealt in virtual shards, so 25 heads over 2 ranks are 13 + 12 and a rank may own none. Key/value
heads go with the query heads that read them, in groups of N / K:

    K >= leaves (8, or the ranks where they are more)   leaves are whole groups: every K/V head lies on one rank
    1 < K < leaves                                      a group is cut into leaves: a rank holds the K/V heads that its
                                                        query heads read, two neighbours the one they share
    K = 1 (multi-query)                                 every rank holds it

A K/V head's gradient adds up over its query heads: within a leaf in ascending order, the leaves in the fixed tree, so
its bits do not depend on where they lie. `KVHeads.grads` does that, with one collective where ranks share heads.
T tokens, N query heads, K key/value heads, H head, L leaves.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from parallel import exact
from parallel.errors import ConfigError
from parallel.ranks.group import Group
from parallel.sharding.rules import Part, VirtualShards
from parallel.sharding.tree import Range, middle


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
    leaves_per_group: int | None = None  # None where leaves are whole groups

    @staticmethod
    def of(group: Group, n_heads: int, n_kv_heads: int, head_dim: int) -> HeadLayout:
        if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ConfigError(
                f"{n_heads} attention heads with {n_kv_heads} key/value heads: every key/value head serves as many "
                f"query heads, so give a divisor of {n_heads}"
            )
        wanted, size = group.num_leaves(n_heads), n_heads // n_kv_heads
        if n_kv_heads >= wanted:
            return HeadLayout(n_heads, n_kv_heads, head_dim, group.shards(n_kv_heads).scaled(size), group.rank)
        leaves = min(size, -(-wanted // n_kv_heads))
        shards = _repeated(VirtualShards.even(size, leaves, 1).borders, n_kv_heads, group.size)
        return HeadLayout(n_heads, n_kv_heads, head_dim, shards, group.rank, leaves_per_group=leaves)

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
        """Those that the local query heads read; of multi-query attention the one, on every rank."""
        first, last = self.kv_range(self.rank)
        return last - first

    @property
    def shares_kv(self) -> bool:
        """Whether all heads read one: multi-query attention."""
        return self.n_kv_heads == 1 and self.n_heads > 1

    @property
    def group_size(self) -> int:
        """Query heads to a key/value head."""
        return self.n_heads // self.n_kv_heads

    def kv_range(self, rank: int) -> Range:
        """The key/value heads that a rank holds."""
        if self.shares_kv:
            return 0, 1
        start, stop = self.shards.range(rank)
        first = start // self.group_size
        return (first, -(-stop // self.group_size)) if stop > start else (first, first)

    @cached_property
    def kv_shards(self) -> VirtualShards:
        """The key/value heads by the rank that counts them in sums over all heads: the first of those that hold one."""
        per_group = self.leaves_per_group
        if per_group is None:
            return VirtualShards(tuple(b // self.group_size for b in self.shards.borders), self.shards.num_ranks)
        return VirtualShards(
            (0, *(head + 1 for head in range(self.n_kv_heads) for _ in range(per_group))), self.shards.num_ranks
        )

    @cached_property
    def kv_part(self) -> Part:
        """How the rows of a key's or value's projection are divided. Of a head that several ranks hold, each answers
        for some of the columns.
        """
        if self.shares_kv:
            return Part(self.head_dim)
        size, ranks = self.n_kv_heads * self.head_dim, range(self.shards.num_ranks)
        if self.leaves_per_group is None:
            return Part(size, self.kv_shards.scaled(self.head_dim))
        columns = VirtualShards.even(self.head_dim, self.leaves_per_group, 1).borders
        shards = _repeated(columns, self.n_kv_heads, len(ranks))
        held = tuple(_whole(shards.range(rank), self.kv_range(rank), self.head_dim) for rank in ranks)
        return Part(size, shards, None if held == tuple(map(shards.range, ranks)) else held)

    def kv_heads(self, group: Group) -> KVHeads | None:
        """How the local query heads read key/value heads; None where each has its own."""
        return KVHeads(self, group) if self.group_size > 1 else None

    @property
    def local_ids(self) -> Sequence[int]:
        """The global numbers of this rank's heads."""
        owned = slice(self.first, self.first + self.n_local)
        return (range(self.n_heads) if self.ids is None else self.ids)[owned]


def alibi_slopes(n_heads: int, alibi_bias_max: float, head_ids: Sequence[int]) -> Tensor:
    """[len(head_ids)] float32 slopes of the given GLOBAL heads (Press et al. 2022; MPT's order for counts that are no
    power of two).
    """
    power = 1 << (n_heads - 1).bit_length()
    exponents = torch.arange(1, power + 1, dtype=torch.float32) * (alibi_bias_max / power)
    slopes = 1.0 / exact.powers(torch.tensor(2.0), exponents).float()
    if power != n_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:n_heads]
    return slopes[list(head_ids)].contiguous()


def _repeated(borders: Sequence[int], times: int, num_ranks: int) -> VirtualShards:
    """The same cuts again and again along an axis."""
    each = borders[-1]
    return VirtualShards((0, *(i * each + border for i in range(times) for border in borders[1:])), num_ranks)


def _whole(own: Range, heads: Range, head_dim: int) -> Range:
    """The columns of whole heads; none where there are no heads."""
    return (heads[0] * head_dim, heads[1] * head_dim) if heads[1] > heads[0] else (own[0], own[0])


class Grouping(NamedTuple):
    """Local query head h reads local key/value head (h + skip) / size."""

    size: int
    skip: int = 0


class KVHeads:
    """The key/value heads of one rank as its query heads read them."""

    def __init__(self, layout: HeadLayout, group: Group) -> None:
        self.layout, self.group = layout, group
        size, n_local, n_kv = layout.group_size, layout.n_local, layout.n_local_kv
        self.grouping = Grouping(max(n_local, 1)) if n_kv == 1 else Grouping(size, layout.first % size)
        self.sums_leaves = layout.leaves_per_group is not None
        """Whether a head's gradient is summed leaf by leaf, so that `grads` needs it of every query head."""

    @property
    def even(self) -> bool:
        """Whether all local key/value heads have as many local query heads."""
        return self.layout.n_local == self.layout.n_local_kv * self.grouping.size

    def spread(self, kv_TKH: Tensor) -> Tensor:
        """[T, N, H]: the head that each query head reads; a view of one that all read."""
        n_local = self.layout.n_local
        if kv_TKH.shape[1] == 1:
            return kv_TKH.expand(-1, n_local, -1)
        size, skip = self.grouping
        return kv_TKH.index_select(1, (torch.arange(n_local, device=kv_TKH.device) + skip) // size)

    def spread_both(self, k_TKH: Tensor, v_TKH: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values by query head, for kernels that know no groups; their gradients are added by `grads`."""
        if torch.is_grad_enabled() and (k_TKH.requires_grad or v_TKH.requires_grad):
            return _Spread.apply(k_TKH, v_TKH, self)
        return self.spread(k_TKH), self.spread(v_TKH)

    def grads(self, *grads_TNH: Tensor) -> tuple[Tensor, ...]:
        """[T, K, H] each: what all query heads gave, added up over the ranks. One collective where they share heads."""
        if not self.sums_leaves:
            return tuple(self._by_group(grad) for grad in grads_TNH)
        layout, dtype = self.layout, grads_TNH[0].dtype
        borders = layout.shards.local_borders(layout.rank)
        leaves = torch.stack([_leaf_sums(grad.float(), borders) for grad in grads_TNH], 1)  # [L, k and v, T, H]
        total = leaves.new_empty((layout.n_local_kv, *leaves.shape[1:]), dtype=dtype)
        shared = self._shared(leaves, dtype) if self._split_heads else {}
        (first, last), lo = layout.kv_range(layout.rank), layout.shards.tree.owners[layout.rank][0]
        for head in range(first, last):
            own = shared.get(head)
            if own is None:
                own = _added(leaves, lo, (0, layout.shards.num_leaves), self._leaves_of[head])
                assert own is not None, "a head that is held is read"
            total[head - first] = own
        return tuple(total[:, i].transpose(0, 1) for i in range(len(grads_TNH)))

    def _by_group(self, grad_TNH: Tensor) -> Tensor:
        """[T, K, H], added in float32, rounded once."""
        grouped = grad_TNH.unflatten(1, (self.layout.n_local_kv, self.grouping.size))
        return exact.ordered_sum(grouped.float(), 2).to(grad_TNH.dtype)

    @cached_property
    def _leaves_of(self) -> list[Range]:
        """The run of leaves of each key/value head, of all ranks' leaves."""
        per_group = self.layout.leaves_per_group
        assert per_group is not None, "whole groups are summed where they lie"
        return [(head * per_group, (head + 1) * per_group) for head in range(self.layout.n_kv_heads)]

    @cached_property
    def _split_heads(self) -> list[int]:
        """The heads whose query heads lie on several ranks."""
        owners = self.layout.shards.tree.owners
        return [
            head for head, (lo, hi) in enumerate(self._leaves_of) if sum(max(lo, a) < min(hi, b) for a, b in owners) > 1
        ]

    def _shared(self, leaves: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """[k and v, T, H] of every head that ranks share. A leaf adds zero to the heads that it does not read."""
        tree, heads, rank = self.layout.shards.tree, self._split_heads, self.layout.rank
        roots = leaves.new_zeros((len(tree.nodes(rank)), len(heads), *leaves.shape[1:]))
        for root, node in zip(roots, tree.nodes(rank), strict=True):
            for place, head in zip(root, heads, strict=True):
                part = _added(leaves, tree.owners[rank][0], node, self._leaves_of[head])
                if part is not None:
                    place.copy_(part)
        return dict(zip(heads, self.group.talk.tree_sum(roots, tree, dtype=dtype), strict=True))


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, heads: KVHeads) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def,override]
        ctx.heads = heads
        return heads.spread(k), heads.spread(v)

    @staticmethod
    def backward(ctx, dk_TNH: Tensor, dv_TNH: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def,override]
        dk_TKH, dv_TKH = ctx.heads.grads(dk_TNH, dv_TNH)
        return dk_TKH, dv_TKH, None


def _added(leaves: Tensor, first: int, node: Range, run: Range) -> Tensor | None:
    """Of a node of the tree, the sum of those leaves that belong to `run`; None where none does. `first` is the number
    of leaves[0].
    """
    lo, hi = node
    if hi <= run[0] or run[1] <= lo:
        return None
    if hi - lo == 1:
        return leaves[lo - first]
    mid = middle(lo, hi)
    left, right = _added(leaves, first, (lo, mid), run), _added(leaves, first, (mid, hi), run)
    if left is None or right is None:
        return right if left is None else left
    return left + right


def _leaf_sums(grad_TNH: Tensor, borders: Sequence[int]) -> Tensor:
    """[leaves, T, H]: each leaf's heads added one after another, in ascending order."""
    leaves = grad_TNH.new_zeros((len(borders) - 1, grad_TNH.shape[0], grad_TNH.shape[2]))
    for leaf, (start, stop) in enumerate(itertools.pairwise(borders)):
        for head in range(start, stop):
            leaves[leaf] += grad_TNH[:, head]
    return leaves
