"""Column- and row-parallel linear layers over virtual shards.

    ColumnLinear   Y_r = X W_r^T + b_r       rows of W divided     forward: none            backward: one reduction
    RowLinear      Y = sum_r X_r W_r^T + b   columns of W divided  forward: one reduction   backward: none

Several row-parallel layers whose results are added share one reduction (`reduce_sum`).
T tokens, K inputs, N outputs. A row-parallel bias is one replicated parameter, added once, after the reduction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.activation import activate, is_native
from parallel.errors import ConfigError
from parallel.group import Group
from parallel.products import Operand, Term, column_sum, outer_product, product, reduced_product
from parallel.shard import Fused, Part, Replicated, Split, VirtualShards, sharded
from parallel.tokens import all_tokens, own_tokens, scatter_tokens


class ColumnLinear(nn.Module):
    """x W^T + b over this rank's outputs. `parts` are blocks of outputs (q, k, v), each split over the ranks or
    replicated.
    """

    def __init__(
        self,
        d_in: int,
        parts: VirtualShards | tuple[Part, ...],
        *,
        group: Group,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.parts = (Part(parts.size, parts),) if isinstance(parts, VirtualShards) else parts
        self.group, self.d_in = group, d_in
        self.d_out = sum(part.size for part in self.parts)
        rule = Split(0, self.parts[0].shards) if len(self.parts) == 1 and self.parts[0].shards else Fused(0, self.parts)
        self.weight = sharded((self.d_out, d_in), rule, group.rank, dtype, device)
        self.bias = sharded((self.d_out,), rule, group.rank, dtype, device) if bias else None
        self._operand: Operand | None = None
        self._backward: list[_BackwardPart] | None = None

    def forward(
        self,
        x_TK: Tensor,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
        tokens: VirtualShards | None = None,
    ) -> Tensor:
        """[T, local outputs]; the activation is applied to the rounded sum, so fusing it changes no bit.

        With `tokens`, x holds this rank's tokens only and the result all of them (sequence parallelism).
        """
        if torch.is_grad_enabled() and (x_TK.requires_grad or self.weight.requires_grad):
            y_TN = _Column.apply(x_TK, self.weight, self.bias, self, dtype, tokens)
            return activate(y_TN, activation) if activation else y_TN
        if activation is None or is_native(x_TK, activation):
            return self.product(x_TK, activation, dtype)
        return activate(self.product(x_TK, None, dtype), activation)

    def product(self, x_TK: Tensor, activation: str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        if self._operand is None:
            self._operand = Operand(self.weight, (0, self.d_in))
        return product([Term(x_TK, self._operand)], self.bias, activation, dtype)

    def input_grad(self, grad_TN: Tensor) -> Tensor:
        """dX = sum over all ranks' outputs of dY W: the split blocks in one tree, the replicated ones added once."""
        if self._backward is None:
            self._backward = _backward_parts(self.parts, self.weight, self.group.rank)
        split = [part for part in self._backward if part.shards]
        total: Tensor | None = None
        if split:
            shards = split[0].shards
            assert shards is not None, "split parts have shards"
            total = reduced_product([part.term(grad_TN) for part in split], shards, self.group)
        for part in self._backward:
            if part.shards is None:
                own = product([part.term(grad_TN)])
                total = own if total is None else total + own
        assert total is not None, "a linear layer has at least one block"
        return total


@dataclass(frozen=True)
class _BackwardPart:
    """A block of outputs as seen from the backward: its local columns of dY against its rows of W."""

    start: int
    stop: int
    operand: Operand
    shards: VirtualShards | None

    def term(self, grad_TN: Tensor) -> Term:
        return Term(grad_TN[:, self.start : self.stop], self.operand)


def _backward_parts(parts: tuple[Part, ...], weight: Tensor, rank: int) -> list[_BackwardPart]:
    made, start = [], 0
    for part in parts:
        stop = start + part.local_size(rank)
        borders = part.shards.local_borders(rank) if part.shards else (0, part.size)
        operand = Operand(weight, borders, rows=(start, stop), transposed=True)
        made.append(_BackwardPart(start, stop, operand, part.shards))
        start = stop
    leaves = {part.shards.num_leaves for part in parts if part.shards}
    if len(leaves) > 1:
        raise ConfigError(
            f"the blocks of one column-parallel layer are cut into {sorted(leaves)} leaves; cut them alike"
        )
    return made


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: ColumnLinear,
        dtype: torch.dtype | None,
        tokens: VirtualShards | None,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.tokens = layer, tokens
        return layer.product(x if tokens is None else all_tokens(x, layer.group, tokens), dtype=dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def,override]
        (x,) = ctx.saved_tensors
        layer, tokens = ctx.layer, ctx.tokens
        grad = grad.to(x.dtype).contiguous()
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_x = layer.input_grad(grad) if wants_x else None
        if tokens is not None:
            x = all_tokens(x, layer.group, tokens)  # gathered again rather than kept
            grad_x = None if grad_x is None else own_tokens(grad_x, layer.group, tokens)
        grad_weight = outer_product(grad, x) if wants_weight else None
        return grad_x, grad_weight, column_sum(grad) if wants_bias else None, None, None, None


class RowLinear(nn.Module):
    """sum over ranks of x_r W_r^T, then + b. The sum is taken by `reduce_sum`, which several layers may share."""

    def __init__(
        self,
        shards: VirtualShards,
        d_out: int,
        *,
        group: Group,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.group, self.shards, self.d_out = group, shards, d_out
        self.weight = sharded((d_out, shards.size), Split(1, shards), group.rank, dtype, device)
        self.bias = sharded((d_out,), Replicated(), group.rank, dtype, device) if bias else None
        self.borders = shards.local_borders(group.rank)
        self.joint_bias: tuple[tuple[tuple[int, int], ...], Tensor] | None = None  # see _joint_bias
        self._operand: Operand | None = None
        self._backward: Operand | None = None

    def partial(self, x_TK: Tensor) -> Partial:
        """This layer's addend, not yet reduced."""
        return Partial(x_TK, self)

    def forward(self, x_TK: Tensor, tokens: VirtualShards | None = None) -> Tensor:
        return reduce_sum(self.partial(x_TK), tokens=tokens)

    def term(self, x_TK: Tensor) -> Term:
        if self._operand is None:
            self._operand = Operand(self.weight, self.borders)
        return Term(x_TK, self._operand)

    def input_grad(self, grad_TN: Tensor) -> Tensor:
        if self._backward is None:
            self._backward = Operand(self.weight, (0, self.d_out), transposed=True)
        return product([Term(grad_TN, self._backward)])


@dataclass(frozen=True, slots=True)
class Partial:
    """A row-parallel layer and its local input: an addend of `reduce_sum`."""

    x: Tensor
    layer: RowLinear


def reduce_sum(*partials: Partial, tokens: VirtualShards | None = None) -> Tensor:
    """The sum of row-parallel layers over all ranks, [T, N]: ONE collective, however many layers are added in it.

    With `tokens`, the result holds this rank's tokens only (sequence parallelism).
    """
    layers = tuple(partial.layer for partial in partials)
    if len({layer.shards.num_leaves for layer in layers}) > 1:
        raise ConfigError(
            f"layers cut into {[layer.shards.num_leaves for layer in layers]} leaves cannot share one reduction; "
            "give them shards with the same num_leaves"
        )
    if torch.is_grad_enabled() and any(p.x.requires_grad or p.layer.weight.requires_grad for p in partials):
        flat = [tensor for p in partials for tensor in (p.x, p.layer.weight, p.layer.bias)]
        return scatter_tokens(_RowSum.apply(layers, *flat), layers[0].group, tokens)
    return _row_sum([partial.x for partial in partials], layers)


def _row_sum(xs: list[Tensor], layers: tuple[RowLinear, ...]) -> Tensor:
    terms = [layer.term(x) for x, layer in zip(xs, layers, strict=True)]
    bias = layers[0].bias if len(layers) == 1 else _joint_bias(layers)
    return reduced_product(terms, layers[0].shards, layers[0].group, bias)


def _joint_bias(layers: tuple[RowLinear, ...]) -> Tensor | None:
    """The float32 sum of the layers' biases, kept until one of them changes."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if len(biases) < 2:
        return biases[0] if biases else None
    stamp = tuple((bias._version, bias.data_ptr()) for bias in biases)
    known = layers[0].joint_bias
    if known is None or known[0] != stamp:
        known = layers[0].joint_bias = (stamp, torch.stack([bias.detach().float() for bias in biases]).sum(0))
    return known[1]


class _RowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layers: tuple[RowLinear, ...], *flat: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def,override]
        xs = [x for x in flat[0::3] if x is not None]
        ctx.save_for_backward(*xs)
        ctx.layers = layers
        return _row_sum(xs, layers)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def,override]
        grad = grad.contiguous()
        grads: list[Tensor | None] = [None]
        for i, (x, layer) in enumerate(zip(ctx.saved_tensors, ctx.layers, strict=True)):
            wants_x, wants_weight, wants_bias = ctx.needs_input_grad[1 + 3 * i : 4 + 3 * i]
            grads.append(layer.input_grad(grad) if wants_x else None)
            grads.append(outer_product(grad, x) if wants_weight else None)
            grads.append(column_sum(grad) if wants_bias else None)
        return tuple(grads)
