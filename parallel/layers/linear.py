"""Column- and row-parallel linear layers over virtual shards.

    ColumnLinear   Y_r = X W_r^T + b_r       rows of W divided     forward: none            backward: one reduction
    RowLinear      Y = sum_r X_r W_r^T + b   columns of W divided  forward: one reduction   backward: none

Several row-parallel layers whose results are added share one reduction (`reduce_sum`), and so in the backward do
several column-parallel ones of the same input (`columns`). Either kind may have a low-rank
`adapter` beside its weight (parallel.layers.low_rank), which joins its products.
T tokens, K inputs, N outputs. A row-parallel bias is one replicated parameter, added once, after the reduction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from parallel.errors import ConfigError
from parallel.exact import ordered_sum
from parallel.layers.dropout import PLAIN, LayerPass
from parallel.layers.low_rank import ColumnAdapter, RowAdapter, active
from parallel.matmul.activation import activate, is_native
from parallel.matmul.grad_sum import weight_grad
from parallel.matmul.input_grad import DividedOutputs, summed_input_grad
from parallel.matmul.packed_store import release, release_quantised
from parallel.matmul.products import Operand, Term, column_sum, outer_product, product, reduced_product
from parallel.quantisation.numbers import Numbers
from parallel.ranks.group import Group
from parallel.ranks.sequence_parallel import all_tokens, own_tokens, scatter_tokens
from parallel.sharding.parameter import Stamp, stamp
from parallel.sharding.rules import Fused, Part, Replicated, Split, VirtualShards, sharded


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
        part, plain = self.parts[0], len(self.parts) == 1 and self.parts[0].held is None
        rule = Split(0, part.shards) if plain and part.shards else Fused(0, self.parts)
        self.weight = sharded((self.d_out, d_in), rule, group.rank, dtype, device)
        self.bias = sharded((self.d_out,), rule, group.rank, dtype, device) if bias else None
        self._operand: Operand | None = None
        self._backward: DividedOutputs | None = None
        self.adapter: ColumnAdapter | None = None

    def forward(
        self,
        x_TK: Tensor,
        now: LayerPass = PLAIN,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """[T, local outputs]; the activation is applied to the rounded sum, so fusing it changes no bit.

        Where tokens are divided x holds this rank's, the result all of them (sequence parallelism).
        """
        branch = active(self.adapter)
        if torch.is_grad_enabled() and (x_TK.requires_grad or self.trains):
            (y_TN,) = _Columns.apply(x_TK, (self,), dtype, now, *self.factors(branch))
            return activate(y_TN, activation, now.recipes) if activation else y_TN
        low_TR = branch.low(x_TK, now) if branch else None
        if activation is None or is_native(x_TK, activation):
            return self.product(x_TK, activation, dtype, low_TR)
        return activate(self.product(x_TK, None, dtype, low_TR), activation)

    def product(
        self,
        x_TK: Tensor,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
        low_TR: Tensor | None = None,
    ) -> Tensor:
        weight, operand = self.weight, self._operand
        if operand is None or operand.parameter is not weight:
            operand = self._operand = Operand(weight, (0, self.d_in))
        terms = [Term(x_TK, operand)]
        if low_TR is not None and self.adapter is not None:
            terms.append(self.adapter.term(low_TR))
        return product(terms, self.bias, activation, dtype)

    def release(self, values: Tensor | None = None) -> None:
        """For serving: the weight is stored packed only; of its present values unless given."""
        release(self.weight, (0, self.d_in), values)

    def quantise(self, numbers: Numbers) -> None:
        """For serving: whole numbers are the weight."""
        release_quantised(self.weight, (0, self.d_in), numbers)

    @property
    def trains(self) -> bool:
        """Whether anything of it wants a gradient."""
        branch = active(self.adapter)
        return self.weight.requires_grad or _trains(self.bias) or (branch is not None and branch.trains)

    def factors(self, branch: ColumnAdapter | None) -> tuple[Tensor | None, ...]:
        """What autograd is to see: weight, bias, and the adapter's a and b."""
        return self.weight, self.bias, *((branch.a, branch.b) if branch else (None, None))

    def backward_outputs(self) -> DividedOutputs:
        """The weight as dX = sum over all ranks' outputs of dY W needs it."""
        if self._backward is None or self._backward.weight is not self.weight:
            self._backward = DividedOutputs(self.parts, self.weight, self.group)
        return self._backward


def columns(x_TK: Tensor, now: LayerPass, *layers: ColumnLinear) -> tuple[Tensor, ...]:
    """Each layer's result of the same input. In the backward ONE reduction, however many layers there are."""
    if not (torch.is_grad_enabled() and (x_TK.requires_grad or any(layer.trains for layer in layers))):
        return tuple(layer(x_TK, now) for layer in layers)
    flat = [factor for layer in layers for factor in layer.factors(active(layer.adapter))]
    return _Columns.apply(x_TK, layers, None, now, *flat)  # type: ignore[no-any-return]


class _Columns(torch.autograd.Function):
    """Besides x each layer has four inputs: weight, bias, and its adapter's a and b."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        ctx,
        x: Tensor,
        layers: tuple[ColumnLinear, ...],
        dtype: torch.dtype | None,
        now: LayerPass,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        full = x if now.tokens is None else all_tokens(x, layers[0].group, now.tokens)
        branches = [layer.adapter if a is not None else None for layer, a in zip(layers, flat[2::4], strict=True)]
        lows = [branch.low(full, now) if branch else None for branch in branches]
        keeps_x = any(ctx.needs_input_grad[4::4]) or any(ctx.needs_input_grad[6::4])
        ctx.save_for_backward(x if keeps_x else None, *lows)
        ctx.layers, ctx.branches, ctx.now, ctx.dtype = layers, branches, now.backward(), x.dtype
        return tuple(layer.product(full, None, dtype, low) for layer, low in zip(layers, lows, strict=True))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def,override]
        x, *lows = ctx.saved_tensors
        layers, branches, now, tokens = ctx.layers, ctx.branches, ctx.now, ctx.now.tokens
        grads = tuple(grad.to(ctx.dtype).contiguous() for grad in grads)
        wants_x, *wants = ctx.needs_input_grad[0], *zip(*(ctx.needs_input_grad[i::4] for i in range(4, 8)), strict=True)
        low_grads = [
            branch.low_grad(grad) if branch and (wants_x or a) else None
            for branch, grad, (_, _, a, _) in zip(branches, grads, wants, strict=True)
        ]
        grad_x = None
        if wants_x:
            grad_x = summed_input_grad(
                [(layer.backward_outputs(), grad) for layer, grad in zip(layers, grads, strict=True)]
            )
            for branch, low_grad in zip(branches, low_grads, strict=True):
                if branch and low_grad is not None:
                    grad_x = grad_x + branch.input_grad(low_grad, now)
        if tokens is not None:
            x = None if x is None else all_tokens(x, layers[0].group, tokens)  # gathered again rather than kept
            grad_x = None if grad_x is None else own_tokens(grad_x, layers[0].group, tokens)
        found: list[Tensor | None] = [grad_x, None, None, None]
        for layer, branch, grad, low, low_grad, (weight, bias, a, b) in zip(
            layers, branches, grads, lows, low_grads, wants, strict=True
        ):
            found.append(weight_grad(layer.weight, grad, x) if weight else None)
            found.append(column_sum(grad) if bias else None)
            found.append(branch.down_grad(low_grad, x, now) if a else None)
            found.append(outer_product(grad, low) if b else None)
        return tuple(found)


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
        self.bias = sharded((d_out,), Replicated(), group.rank, dtype, device, counted=True) if bias else None
        self.borders = shards.local_borders(group.rank)
        self.joint_bias: tuple[list[Tensor], list[Stamp], Tensor] | None = None  # see _joint_bias
        self.adapter: RowAdapter | None = None
        self._operand: Operand | None = None
        self._backward: Operand | None = None

    def partial(self, x_TK: Tensor) -> Partial:
        """This layer's addend, not yet reduced."""
        return Partial(x_TK, self)

    def forward(self, x_TK: Tensor, now: LayerPass = PLAIN) -> Tensor:
        return reduce_sum(now, self.partial(x_TK))

    def term(self, x_TK: Tensor) -> Term:
        weight, operand = self.weight, self._operand
        if operand is None or operand.parameter is not weight:
            operand = self._operand = Operand(weight, self.borders)
        return Term(x_TK, operand)

    def release(self, values: Tensor | None = None) -> None:
        """For serving: the weight is stored packed only; of its present values unless given."""
        release(self.weight, self.borders, values)

    def quantise(self, numbers: Numbers) -> None:
        """For serving: whole numbers are the weight."""
        release_quantised(self.weight, self.borders, numbers)

    def back_term(self, grad_TN: Tensor) -> Term:
        """dX = dY W, as an addend."""
        if self._backward is None or self._backward.parameter is not self.weight:
            self._backward = Operand(self.weight, (0, self.d_out), transposed=True)
        return Term(grad_TN, self._backward)

    def input_grad(self, grad_TN: Tensor) -> Tensor:
        return product([self.back_term(grad_TN)])


class Partial(NamedTuple):
    """A row-parallel layer and its local input: an addend of `reduce_sum`."""

    x: Tensor
    layer: RowLinear


def reduce_sum(now: LayerPass, *partials: Partial) -> Tensor:
    """The sum of row-parallel layers over all ranks, [T, N]: ONE collective, however many layers are added in it.

    Where tokens are divided the result holds this rank's only (sequence parallelism).
    """
    layers = tuple(partial.layer for partial in partials)
    if len({layer.shards.num_leaves for layer in layers}) > 1:
        raise ConfigError(
            f"layers cut into {[layer.shards.num_leaves for layer in layers]} leaves cannot share one reduction; "
            "give them shards with the same num_leaves"
        )
    branches = [active(layer.adapter) for layer in layers]
    if torch.is_grad_enabled() and (
        any(p.x.requires_grad for p in partials)
        or any(layer.weight.requires_grad or _trains(layer.bias) for layer in layers)
        or any(branch is not None and branch.trains for branch in branches)
    ):
        flat: list[Tensor | None] = []
        for p, branch in zip(partials, branches, strict=True):
            flat += [p.x, p.layer.weight, p.layer.bias, *((branch.a, branch.b) if branch else (None, None))]
        return scatter_tokens(_RowSum.apply(layers, now, *flat), layers[0].group, now.tokens)
    xs = [partial.x for partial in partials]
    added = [(branch, branch.lows(x, now)) if branch else None for x, branch in zip(xs, branches, strict=True)]
    return _row_sum(xs, layers, added)


def _row_sum(
    xs: list[Tensor], layers: tuple[RowLinear, ...], branches: list[tuple[RowAdapter, Tensor] | None]
) -> Tensor:
    terms = [layer.term(x) for x, layer in zip(xs, layers, strict=True)]
    terms += [branch[0].term(branch[1], xs[0].dtype) for branch in branches if branch]
    bias = layers[0].bias if len(layers) == 1 else _joint_bias(layers)
    return reduced_product(terms, layers[0].shards, layers[0].group, bias)


def _joint_bias(layers: tuple[RowLinear, ...]) -> Tensor | None:
    """The float32 sum of the layers' biases, kept until one of them changes."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if len(biases) < 2:
        return biases[0] if biases else None
    now, known = [stamp(bias) for bias in biases], layers[0].joint_bias
    if known is None or known[1] != now or any(a is not b for a, b in zip(known[0], biases, strict=True)):
        joint = ordered_sum(torch.stack([bias.detach().float() for bias in biases]), 0)
        known = layers[0].joint_bias = ([*biases], now, joint)
    return known[2]


def _trains(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


class _RowSum(torch.autograd.Function):
    """Each layer has five inputs: x, weight, bias, and its adapter's a and b."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        ctx, layers: tuple[RowLinear, ...], now: LayerPass, *flat: Tensor | None
    ) -> Tensor:
        xs = [x for x in flat[0::5] if x is not None]
        branches = [layer.adapter if a is not None else None for layer, a in zip(layers, flat[3::5], strict=True)]
        lows = [branch.lows(x, now) if branch else None for x, branch in zip(xs, branches, strict=True)]
        wants = ctx.needs_input_grad
        kept = [x if wants[3 + 5 * i] or wants[5 + 5 * i] else None for i, x in enumerate(xs)]
        ctx.save_for_backward(*kept, *lows)
        ctx.layers, ctx.branches, ctx.now = layers, branches, now.backward()
        added = [(b, low) if b and low is not None else None for b, low in zip(branches, lows, strict=True)]
        return _row_sum(xs, layers, added)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def,override]
        grad = grad.contiguous()
        grads: list[Tensor | None] = [None, None]
        saved = ctx.saved_tensors  # asked for once: under recomputation they can be unpacked only once
        xs, lows = saved[: len(ctx.layers)], saved[len(ctx.layers) :]
        for i, (layer, branch, x, low) in enumerate(zip(ctx.layers, ctx.branches, xs, lows, strict=True)):
            wants_x, wants_weight, wants_bias, wants_a, wants_b = ctx.needs_input_grad[2 + 5 * i : 7 + 5 * i]
            low_grad = branch.low_grad(grad) if branch and (wants_x or wants_a) else None
            if wants_x and low_grad is not None:
                grads.append(branch.input_grad(layer.back_term(grad), low_grad, ctx.now))
            else:
                grads.append(layer.input_grad(grad) if wants_x else None)
            grads.append(weight_grad(layer.weight, grad, x) if wants_weight else None)
            grads.append(column_sum(grad) if wants_bias else None)
            grads.append(branch.down_grad(low_grad, x, ctx.now) if wants_a else None)
            grads.append(outer_product(grad, branch.low(low, grad.dtype)) if wants_b else None)
        return tuple(grads)
