"""Layer normalisation of replicated, or by tokens divided, activations; weight and bias are replicated.

Forward: no collective. Backward: the gains' gradients are sums over tokens, taken leaf by leaf over token shards
and in the fixed tree, so that they are the same bits whether the tokens are divided over the ranks (then one
collective) or not (then none).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from parallel.group import Group
from parallel.products import leaf_tree
from parallel.recompute import cheap
from parallel.shard import Replicated, VirtualShards, sharded
from parallel.tree import leaves_sum


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis; statistics in float32, row by row."""

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        group: Group | None = None,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group = eps, group or Group.single()
        self.shape = (size,)
        self.weight = sharded((size,), Replicated(), 0, dtype, device)
        self.bias = sharded((size,), Replicated(), 0, dtype, device) if bias else None

    def forward(self, x_TD: Tensor, tokens: VirtualShards | None = None) -> Tensor:
        """[T, D]; with `tokens`, x holds this rank's tokens only."""
        if torch.is_grad_enabled() and (x_TD.requires_grad or self.weight.requires_grad):
            y_TD = _LayerNorm.apply(x_TD, self.weight, self.bias, self, tokens)
            return cheap(y_TD, lambda: normalise(x_TD, self))
        return normalise(x_TD, self)


def normalise(x_TD: Tensor, layer: LayerNorm) -> Tensor:
    """By torch: row by row, so a row's bits do not depend on its neighbours; and its call is the cheapest."""
    return torch.layer_norm(x_TD, layer.shape, layer.weight, layer.bias, layer.eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, layer: LayerNorm, tokens: VirtualShards | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.tokens = layer, tokens
        return normalise(x, layer)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def,override]
        x, weight = ctx.saved_tensors
        wide, grad = x.float(), grad.float()
        variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + ctx.layer.eps)
        unit = (wide - mean) * scale
        weighted = grad * weight.float()
        inner = weighted - weighted.mean(-1, keepdim=True) - unit * (weighted * unit).mean(-1, keepdim=True)
        gain, shift = _token_sums(grad * unit, grad, ctx.layer.group, ctx.tokens)
        wants_weight, wants_bias = ctx.needs_input_grad[1:3]
        return (
            (inner * scale).to(x.dtype),
            gain.to(weight.dtype) if wants_weight else None,
            shift.to(weight.dtype) if wants_bias else None,
            None,
            None,
        )


def _token_sums(a_TD: Tensor, b_TD: Tensor, group: Group, tokens: VirtualShards | None) -> tuple[Tensor, Tensor]:
    """Both tensors summed over all tokens of the row, in the tree over token shards. Both are [T, D] float32."""
    borders = group.shards(a_TD.shape[0]).borders if tokens is None else tokens.local_borders(group.rank)
    pairs = [torch.stack([t[lo:hi].sum(0) for t in (a_TD, b_TD)]) for lo, hi in itertools.pairwise(borders)]
    if tokens is None:
        total = leaves_sum(pairs)
    else:
        leaves = torch.stack(pairs) if pairs else a_TD.new_zeros((0, 2, a_TD.shape[1]))
        total = group.talk.tree_sum(leaf_tree(leaves, tokens.local_nodes(group.rank)), tokens.tree)
    return total[0], total[1]
