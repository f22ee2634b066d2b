"""Layer and RMS norms of replicated, or by tokens divided, activations; weight and bias are replicated.

Forward: no collective. Backward: the gains' gradients are sums over tokens, taken leaf by leaf over token shards
and in the fixed tree, so that they are the same bits whether the tokens are divided over the ranks (then one
collective) or not (then none).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from parallel.layers.dropout import PLAIN, LayerPass
from parallel.matmul.products import leaf_tree, uses_native
from parallel.native import elementwise
from parallel.ranks.group import Group
from parallel.recompute import cheap
from parallel.sharding.rules import Replicated, VirtualShards, sharded
from parallel.sharding.tree import leaves_sum


class Norm(nn.Module, ABC):
    """What both kinds have in common: statistics in float32, row by row, then weight (and bias) over the last axis."""

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

    def forward(self, x_TD: Tensor, now: LayerPass = PLAIN) -> Tensor:
        """[T, D]; where tokens are divided, of this rank's."""
        if torch.is_grad_enabled() and (x_TD.requires_grad or self.weight.requires_grad):
            y_TD = _Norm.apply(x_TD, self.weight, self.bias, self, now.tokens)
            return cheap(y_TD, lambda: self.normalise(x_TD), now.recipes)
        return self.normalise(x_TD)

    @abstractmethod
    def normalise(self, x_TD: Tensor) -> Tensor:
        """Row by row, so that a row's bits do not depend on its neighbours."""

    @abstractmethod
    def grads(self, x_TD: Tensor, grad_TD: Tensor, borders: Sequence[int]) -> tuple[Tensor, Tensor]:
        """dx, and of each leaf of tokens the sums [leaves, 2, D] of the gains' gradients."""


class LayerNorm(Norm):
    """(x - mean) / sqrt(var + eps) * weight + bias."""

    def normalise(self, x_TD: Tensor) -> Tensor:
        if uses_native(x_TD):
            return elementwise.layer_norm(x_TD, self.weight, self.bias, self.eps)
        return torch.layer_norm(x_TD, self.shape, self.weight, self.bias, self.eps)

    def grads(self, x_TD: Tensor, grad_TD: Tensor, borders: Sequence[int]) -> tuple[Tensor, Tensor]:
        if uses_native(x_TD):
            return elementwise.layer_norm_grad(x_TD, grad_TD, self.weight, self.eps, borders)
        return torch_grads(x_TD, grad_TD, self.weight, self.eps, borders, centred=True)


class RMSNorm(Norm):
    """x / sqrt(mean(x^2) + eps) * weight, rounded once."""

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        group: Group | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(size, eps, group=group, bias=False, dtype=dtype, device=device)

    def normalise(self, x_TD: Tensor) -> Tensor:
        if uses_native(x_TD):
            return elementwise.rms_norm(x_TD, self.weight, self.eps)
        return torch_rms_norm(x_TD, self.weight, self.eps)

    def grads(self, x_TD: Tensor, grad_TD: Tensor, borders: Sequence[int]) -> tuple[Tensor, Tensor]:
        if uses_native(x_TD):
            return elementwise.layer_norm_grad(x_TD, grad_TD, self.weight, self.eps, borders, centred=False)
        return torch_grads(x_TD, grad_TD, self.weight, self.eps, borders, centred=False)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Norm, tokens: VirtualShards | None
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.tokens = layer, tokens
        return layer.normalise(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def,override]
        (x,), layer, tokens = ctx.saved_tensors, ctx.layer, ctx.tokens
        group = layer.group
        borders = group.shards(x.shape[0]).borders if tokens is None else tokens.local_borders(group.rank)
        grad_x, leaves = layer.grads(x, grad.to(x.dtype), borders)
        wants_weight, wants_bias = ctx.needs_input_grad[1:3]
        if not (wants_weight or wants_bias):  # the same on all ranks
            return grad_x, None, None, None, None
        if tokens is None:
            total = leaves_sum(leaves.unbind())
        else:
            total = group.talk.tree_sum(leaf_tree(leaves, tokens.local_nodes(group.rank)), tokens.tree)
        gain, shift = total.to(layer.weight.dtype)
        return grad_x, gain if wants_weight else None, shift if wants_bias else None, None, None


def torch_rms_norm(x_TD: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Without the native kernels."""
    wide = x_TD.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x_TD.dtype)


def torch_grads(
    x_TD: Tensor, grad_TD: Tensor, weight: Tensor, eps: float, borders: Sequence[int], centred: bool
) -> tuple[Tensor, Tensor]:
    """`Norm.grads` without the native kernels; an RMS norm is not centred."""
    wide, grad = x_TD.float(), grad_TD.float()
    if centred:
        variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    else:
        variance, mean = wide.square().mean(-1, keepdim=True), torch.zeros((), device=wide.device)
    scale = torch.rsqrt(variance + eps)
    unit = (wide - mean) * scale
    weighted = grad * weight.float()
    inner = weighted - weighted.mean(-1, keepdim=True) if centred else weighted
    inner = inner - unit * (weighted * unit).mean(-1, keepdim=True)
    pairs = torch.stack((grad * unit, grad))
    leaves = [pairs[:, lo:hi].sum(1) for lo, hi in itertools.pairwise(borders)]
    none = wide.new_zeros((0, 2, wide.shape[1]))
    return (inner * scale).to(x_TD.dtype), torch.stack(leaves) if leaves else none
