"""The low-rank branch beside a sharded linear layer (LoRA: Hu et al., arXiv 2106.09685): y += s (x A^T) B^T.

    ColumnAdapter   A [R, K] replicated, B [N, R] divided like W's rows
        forward     u = s x A^T, the same on every rank; u B^T joins x W^T in one product        no collective
        backward    du = s sum over outputs of dY B: ONE small reduction [T, R]; dX += du A, dA = du^T x, dB = dY^T u
    RowAdapter      A [R, K] divided like W's columns, B [N, R] replicated
        forward     leaf l gives u_l = s x_l A_l^T, and u_l B^T joins leaf l of x W^T           no collective of its own
        backward    u = sum of u_l: ONE small reduction [T, R]; du = s dY B; dX += du A, dA = du^T x, dB = dY^T u

A row layer applies B leaf by leaf, before the reduction: a few columns more per leaf, and the layer (or several that
share it) keeps its single collective. All sums run in the fixed tree, so no bit depends on the number of ranks. In a
pass that drops, x is dropped on its way into A, by masks that depend on no layout. Knows no name and no file. T tokens,
K inputs, N outputs, R rank, L local leaves.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from parallel.errors import ConfigError
from parallel.layers.dropout import PLAIN, DropoutSite, LayerPass
from parallel.matmul.input_grad import DividedOutputs
from parallel.matmul.products import Operand, Term, leaf_tree, nodes, outer_product, product
from parallel.native.packed_weight import PackedMatrix
from parallel.ranks.group import Group
from parallel.sharding.released_weight import assign, values
from parallel.sharding.rules import Part, Replicated, Split, VirtualShards, full_shape_of, rule_of, sharded


class Adapter(nn.Module):
    """A and B beside a weight W [N, K], and whether they are added into W at the moment."""

    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, scale: float, first_column: int, site: DropoutSite | None) -> None:
        super().__init__()
        self.scale, self.first_column, self.site = scale, first_column, site
        self.merged = False
        self._base: Tensor | None = None
        self._operands: dict[str, Operand] = {}

    def _operand(self, use: str, parameter: Tensor, borders: tuple[int, ...], transposed: bool = False) -> Operand:
        """A or B as the right-hand side of products, made for the parameter that is there now."""
        known = self._operands.get(use)
        if known is None or known.parameter is not parameter:
            known = self._operands[use] = Operand(parameter, borders, transposed=transposed)
        return known

    def _back_term(self, low_grad_TR: Tensor) -> Term:
        """du A, as an addend."""
        return Term(low_grad_TR, self._operand("down back", self.a, (0, self.a.shape[0]), transposed=True))

    @property
    def trains(self) -> bool:
        return self.a.requires_grad or self.b.requires_grad

    def dropped(self, x_TK: Tensor, now: LayerPass) -> Tensor:
        """The branch's input, or its gradient, masked. All tokens of the pass, on every rank."""
        if self.site is None or now.dropping is None:
            return x_TK
        if len(now.dropping.keys_T) != len(x_TK):
            raise ConfigError(
                f"masks for {len(now.dropping.keys_T)} tokens met {len(x_TK)} rows in a low-rank branch; dropout is "
                "only for layers that every token of the pass goes through: set the adapter's dropout to 0"
            )
        return self.site(x_TK, now.of(None), self.first_column)

    def down_grad(self, low_grad_TR: Tensor, x_TK: Tensor, now: LayerPass) -> Tensor:
        """A's gradient, [R, K]."""
        return outer_product(low_grad_TR, self.dropped(x_TK, now))

    @torch.no_grad()
    def delta(self) -> Tensor:
        """s B A of this rank's part of W, float32; an element's bits do not depend on how W is divided."""
        return outer_product(self.b.detach().t().float(), self.a.detach().float()) * self.scale

    @torch.no_grad()
    def merge(self, weight: Tensor, keep: bool) -> None:
        """W += s B A, rounded once. With `keep`, unmerging gives W's very bits back, at the price of a copy of it."""
        base = values(weight)
        self._base = base.clone() if keep else None
        assign(weight, base.float() + self.delta())
        self.merged = True

    @torch.no_grad()
    def unmerge(self, weight: Tensor) -> None:
        assign(weight, values(weight).float() - self.delta() if self._base is None else self._base)
        self._base, self.merged = None, False


class ColumnAdapter(Adapter):
    """The branch of a column-parallel layer."""

    def __init__(
        self,
        weight: Tensor,
        parts: tuple[Part, ...],
        group: Group,
        rank: int,
        scale: float,
        site: DropoutSite | None = None,
    ) -> None:
        super().__init__(scale, 0, site)
        d_out, d_in = full_shape_of(weight)
        self.parts, self.group = parts, group
        self.a = sharded((rank, d_in), Replicated(), group.rank, weight.dtype, weight.device)
        self.b = sharded((d_out, rank), rule_of(weight), group.rank, weight.dtype, weight.device)
        self._up_back: DividedOutputs | None = None

    def low(self, x_TK: Tensor, now: LayerPass = PLAIN) -> Tensor:
        """[T, R], scaled."""
        down = self._operand("down", self.a, (0, self.a.shape[1]))
        return product([Term(self.dropped(x_TK, now), down)]) * self.scale

    def term(self, low_TR: Tensor) -> Term:
        """This branch's addend of the layer's product."""
        return Term(low_TR, self._operand("up", self.b, (0, self.b.shape[1])))

    def low_grad(self, grad_TN: Tensor) -> Tensor:
        """[T, R], the same on every rank. One reduction."""
        if self._up_back is None or self._up_back.weight is not self.b:
            self._up_back = DividedOutputs(self.parts, self.b, self.group)
        return self._up_back.input_grad(grad_TN) * self.scale

    def input_grad(self, low_grad_TR: Tensor, now: LayerPass) -> Tensor:
        return self.dropped(product([self._back_term(low_grad_TR)]), now)


class RowAdapter(Adapter):
    """The branch of a row-parallel layer."""

    def __init__(
        self,
        weight: Tensor,
        shards: VirtualShards,
        group: Group,
        rank: int,
        scale: float,
        site: DropoutSite | None = None,
    ) -> None:
        super().__init__(scale, shards.range(group.rank)[0], site)
        d_out, d_in = full_shape_of(weight)
        borders = shards.local_borders(group.rank)
        self.shards, self.group, self.borders, self.num_leaves = shards, group, borders, len(borders) - 1
        self.a = sharded((rank, d_in), Split(1, shards), group.rank, weight.dtype, weight.device)
        self.b = sharded((d_out, rank), Replicated(), group.rank, weight.dtype, weight.device)
        self._up: _RepeatedOperand | None = None

    def lows(self, x_TK: Tensor, now: LayerPass = PLAIN) -> Tensor:
        """[L, T, R] float32, scaled."""
        term = Term(self.dropped(x_TK, now), self._operand("down", self.a, self.borders))
        return nodes([term], [(leaf, leaf + 1) for leaf in range(self.num_leaves)]) * self.scale

    def term(self, lows_LTR: Tensor, dtype: torch.dtype) -> Term:
        """This branch's addend of the layer's product, leaf by leaf."""
        if self._up is None or self._up.parameter is not self.b:
            self._up = _RepeatedOperand(self.b, self.num_leaves)
        return Term(lows_LTR.to(dtype).permute(1, 0, 2).flatten(1), self._up)

    def low(self, lows_LTR: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, R] over all ranks' leaves. One reduction."""
        roots = leaf_tree(lows_LTR, self.shards.local_nodes(self.group.rank))
        if self.group.size == 1:
            return roots[0].to(dtype)
        return self.group.talk.tree_sum(roots, self.shards.tree, dtype=dtype)

    def low_grad(self, grad_TN: Tensor) -> Tensor:
        """[T, R], the same on every rank."""
        up_back = self._operand("up back", self.b, (0, self.b.shape[0]), transposed=True)
        return product([Term(grad_TN, up_back)]) * self.scale

    def input_grad(self, layer_term: Term, low_grad_TR: Tensor, now: LayerPass) -> Tensor:
        """The layer's input gradient and this branch's: one product, unless masks come between."""
        own = self._back_term(low_grad_TR)
        if self.site is None or not self.site.active(now):
            return product([layer_term, own])
        return product([layer_term]) + self.dropped(product([own]), now)


AdapterT = TypeVar("AdapterT", bound=Adapter)


class _RepeatedOperand(Operand):
    """B beside itself once for every local leaf, [N, L R]: each leaf's u meets a B of its own."""

    def __init__(self, parameter: Tensor, num_leaves: int) -> None:
        super().__init__(parameter, tuple(leaf * parameter.shape[1] for leaf in range(num_leaves + 1)))
        self._count = num_leaves

    def matrix(self) -> Tensor:
        return self.parameter.detach().repeat(1, self._count)

    def follow(self, packed: PackedMatrix) -> None:
        packed.follow(self.matrix, self.parameter if self._count else None)


def active(adapter: AdapterT | None) -> AdapterT | None:
    """The adapter, where there is one that is not merged. A merged one gets no gradient, so it cannot be trained."""
    if adapter is None or not adapter.merged:
        return adapter
    if adapter.trains and torch.is_grad_enabled():
        raise ConfigError("the adapter is merged into its layer's weight and cannot be trained so; unmerge it first")
    return None
