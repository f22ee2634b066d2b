"""RMS norms of every query head and of every key head; one weight for all heads of a kind, replicated.

Forward: no collective. Backward: the weights' gradients are sums over tokens and over heads, which are divided over the
ranks: leaf by leaf, in the fixed tree, in one collective for both. A key head that several ranks hold counts once.
T tokens, N local query heads, K local key heads, H head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel.attention.heads import HeadLayout
from parallel.layers.dropout import PLAIN, LayerPass
from parallel.layers.norm import RMSNorm
from parallel.matmul.products import leaf_tree
from parallel.ranks.group import Group
from parallel.recompute import cheap
from parallel.sharding.rules import VirtualShards


class QueryKeyNorm(nn.Module):
    """RMS norms of every query head and of every key head, one weight for all heads of a kind."""

    def __init__(
        self,
        layout: HeadLayout,
        eps: float,
        *,
        group: Group,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.group = layout, group
        self.q, self.k = (RMSNorm(layout.head_dim, eps, dtype=dtype, device=device) for _ in range(2))

    def forward(self, q_TNH: Tensor, k_TKH: Tensor, now: LayerPass = PLAIN) -> tuple[Tensor, Tensor]:
        """Of this rank's heads. A key head that several ranks hold brings each of them its whole gradient."""
        if torch.is_grad_enabled() and (
            any(x.requires_grad for x in (q_TNH, k_TKH)) or any(p.requires_grad for p in self.parameters())
        ):
            q, k = _QueryKeyNorm.apply(q_TNH, k_TKH, self.q.weight, self.k.weight, self)
            cheap(q, lambda: _by_row(self.q, q_TNH), now.recipes)
            return q, cheap(k, lambda: _by_row(self.k, k_TKH), now.recipes)
        return _by_row(self.q, q_TNH), _by_row(self.k, k_TKH)

    def borders(self, count: int, num_tokens: int, shards: VirtualShards, first_held: int) -> tuple[int, ...]:
        """Where the leaves that this rank counts begin and end among the rows of `count` heads, one head's tokens after
        another's. The first and the last leaf are what it holds besides, for others to count.
        """
        start = shards.range(self.group.rank)[0] - first_held
        cuts = tuple((start + border) * num_tokens for border in shards.local_borders(self.group.rank))
        return (0, *cuts, count * num_tokens)


def _by_row(norm: RMSNorm, x_TNH: Tensor) -> Tensor:
    return norm.normalise(x_TNH.flatten(0, 1)).view(x_TNH.shape)


class _QueryKeyNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        ctx, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, norms: QueryKeyNorm
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k)
        ctx.norms = norms
        return _by_row(norms.q, q), _by_row(norms.k, k)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def,override]
        (q, k), norms = ctx.saved_tensors, ctx.norms
        layout, group = norms.layout, norms.group
        firsts = layout.first, layout.kv_range(group.rank)[0]
        found, sums = [], []
        for norm, x, grad, shards, first in zip(
            (norms.q, norms.k), (q, k), (dq, dk), (layout.shards, layout.kv_shards), firsts, strict=True
        ):
            borders = norms.borders(x.shape[1], x.shape[0], shards, first)
            rows, back = (one.transpose(0, 1).flatten(0, 1) for one in (x, grad.to(x.dtype)))  # head by head
            own, leaves = norm.grads(rows, back.contiguous(), borders)
            found.append(own.view(x.shape[1], *x.shape[::2]).transpose(0, 1))
            sums.append(leaves[1:-1, 0])
        if not any(ctx.needs_input_grad[2:4]):  # the same on all ranks
            return *found, None, None, None
        roots = leaf_tree(torch.stack(sums, 1), layout.shards.local_nodes(group.rank))
        total = roots[0] if group.size == 1 else group.talk.tree_sum(roots, layout.shards.tree)
        gains = [gain.to(norms.q.weight.dtype) for gain in total]
        return (
            *found,
            *(gain if wanted else None for gain, wanted in zip(gains, ctx.needs_input_grad[2:4], strict=True)),
            None,
        )
