"""Collectives as autograd pairs, named by their forward. In a group of one all are the identity.

    reduce_from    forward: sum over ranks         backward: identity
    gather_from    forward: concatenate shards     backward: the rank's own slice
    scatter_to     forward: the rank's own slice   backward: concatenate shards

These sums have one non-zero addend per element, or are of numerics "fast"; sums whose order matters go through
parallel.matmul.products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.ranks.group import Group


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """Adds every rank's partial result; the sum is replicated."""
    return x if group.size == 1 else _ReduceFrom.apply(x, group)


def gather_from(x: Tensor, group: Group, sizes: Sequence[int], dim: int = -1) -> Tensor:
    """Concatenates every rank's shard (sizes[r] along dim); the result is replicated."""
    return x if group.size == 1 else _GatherFrom.apply(x, group, tuple(sizes), dim)


def scatter_to(x: Tensor, group: Group, sizes: Sequence[int], dim: int = -1) -> Tensor:
    """This rank's slice of a replicated tensor."""
    return x if group.size == 1 else _ScatterTo.apply(x, group, tuple(sizes), dim)


def _own_slice(x: Tensor, group: Group, sizes: Sequence[int], dim: int) -> Tensor:
    return x.narrow(dim, sum(sizes[: group.rank]), sizes[group.rank]).contiguous()


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[no-untyped-def,override]
        return group.talk.sum(x.contiguous())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def,override]
        return grad, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group, sizes: tuple[int, ...], dim: int) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.group, ctx.sizes, ctx.dim = group, sizes, dim
        return group.talk.all_gather(x.contiguous(), sizes, dim)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def,override]
        return _own_slice(grad, ctx.group, ctx.sizes, ctx.dim), None, None, None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group, sizes: tuple[int, ...], dim: int) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.group, ctx.sizes, ctx.dim = group, sizes, dim
        return _own_slice(x, group, sizes, dim)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def,override]
        return ctx.group.talk.all_gather(grad.contiguous(), ctx.sizes, ctx.dim), None, None, None
