"""Matrix products of sharded layers, in the order that keeps their bits: one seam over the kernels that compute them.

`product` returns x W^T summed over all its leaves; `reduced_product` adds the ranks' subtrees through one
collective (tree_sum, or a plain sum with numerics "fast"). On CPU the native kernel does both; elsewhere, or where
there is no compiler, torch does, leaf by leaf. `Operand` owns the packed form of a parameter: derived, never saved,
made again at the first product after a write (parallel.sharding.parameter says which are counted, and who has to say
`written`; one that forgot to is mostly found by looking at a few elements per product). Of a released weight the packed
form is the weight (packed_store).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from parallel.errors import WeightReleased
from parallel.matmul import onednn
from parallel.matmul.activation import activate
from parallel.matmul.packed_store import panels_of
from parallel.native import elementwise, gemm, memory
from parallel.native.compiled import library
from parallel.native.operands import DTYPES as NATIVE_DTYPES
from parallel.native.packed_weight import PackedMatrix
from parallel.ranks.group import Group
from parallel.sharding.parameter import Stamp, stamp
from parallel.sharding.released_weight import ReleasedWeight
from parallel.sharding.rules import VirtualShards
from parallel.sharding.tree import Range, leaves_sum, middle


def native_products() -> bool:
    """Whether the native kernels are at hand in this process: `library` alone knows, nobody remembers its answer."""
    return library.available()


def uses_native(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype in NATIVE_DTYPES and native_products()


class Operand:
    """The right-hand side of products with a parameter: rows [start, stop) of it, transposed or not, packed for the
    kernel.

    `borders` cut the reduced axis into this rank's leaves.
    """

    def __init__(
        self, parameter: Tensor, borders: tuple[int, ...], rows: Range | None = None, transposed: bool = False
    ) -> None:
        self.parameter = parameter
        self.borders = borders
        self._rows = rows
        self._transposed = transposed
        self._packed: PackedMatrix | None = None
        self._stamp: Stamp | None = None
        self._leaves: dict[int, onednn.PackedLeaf] = {}
        self._leaves_stamp: Stamp | None = None

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickled ones pack anew: what is packed is known by its address."""
        return {**self.__dict__, "_packed": None, "_stamp": None, "_leaves": {}, "_leaves_stamp": None}

    def matrix(self) -> Tensor:
        """[N, K]: outputs by reduction."""
        return _matrix(self.parameter, self._rows, self._transposed)

    def follow(self, packed: PackedMatrix) -> None:
        """Fills it, and has it watch the parameter's memory."""
        packed.follow(partial(_matrix, self.parameter, self._rows, self._transposed))

    @property
    def num_outputs(self) -> int:
        if self._transposed:
            return self.parameter.shape[1]
        return self.parameter.shape[0] if self._rows is None else self._rows[1] - self._rows[0]

    def packed(self) -> gemm.Panels:
        """The packed form, made again if the parameter was written to or its memory replaced since."""
        if isinstance(self.parameter, ReleasedWeight):
            return self._stored(self.parameter)
        now = stamp(self.parameter)
        if self._packed is None or now != self._stamp:
            self.refresh()
            self._stamp = now
        assert self._packed is not None, "refresh makes it"
        return self._packed

    def _stored(self, weight: ReleasedWeight) -> gemm.Panels:
        if self._transposed or self._rows is not None:
            raise WeightReleased(
                "a gradient through a weight that is stored packed only, for serving, needs it transposed, too; load "
                "the model with packed=False to train it"
            )
        return panels_of(weight)

    def refresh(self) -> None:
        """Takes over the parameter's present values, whatever is known of writes to it."""
        matrix = self.matrix()
        if self._packed is None or (self._packed.n, self._packed.k, self._packed.dtype) != (
            *matrix.shape,
            matrix.dtype,
        ):
            self._packed = PackedMatrix.made_for(matrix, self.borders, memory.weights.take)
        self.follow(self._packed)
        self._leaves, self._leaves_stamp = {}, None

    def leaf_product(self, x_TK: Tensor, leaf: int) -> Tensor:
        """Without the native kernels: x (all local columns) against one leaf, by oneDNN or else by torch."""
        start, stop = self.borders[leaf], self.borders[leaf + 1]
        if stop == start or not (x_TK.is_cpu and x_TK.dtype in NATIVE_DTYPES and onednn.available()):
            return functional.linear(x_TK[:, start:stop], self.matrix()[:, start:stop])
        now, matrix = stamp(self.parameter), self.matrix()[:, start:stop]
        if now != self._leaves_stamp:
            self._leaves, self._leaves_stamp = {}, now
        if leaf not in self._leaves or self._leaves[leaf].differs(matrix):
            self._leaves[leaf] = onednn.PackedLeaf(matrix)
        return self._leaves[leaf].product(x_TK[:, start:stop])


def _matrix(parameter: Tensor, rows: Range | None, transposed: bool) -> Tensor:
    full = parameter.detach()
    part = full if rows is None else full[rows[0] : rows[1]]
    return part.t() if transposed else part


class Term(NamedTuple):
    """One addend of a product: x [T, K] against an operand [N, K]."""

    x: Tensor
    operand: Operand


def product(
    terms: Sequence[Term], bias: Tensor | None = None, activation: str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The sum over all leaves of all terms, [T, N]: leaf i runs through every term's i-th range, leaves add up in the
    fixed tree.
    """
    if uses_native(terms[0].x):
        return gemm.product(_sources(terms), bias, activation, dtype)
    total = _torch_node(terms, 0, len(terms[0].operand.borders) - 1)
    if bias is not None:
        total = total + bias
    total = total.to(dtype or terms[0].x.dtype)
    return activate(total, activation) if activation else total


def nodes(terms: Sequence[Term], ranges: Sequence[Range]) -> Tensor:
    """The roots of complete subtrees of leaves, [len(ranges), T, N] float32."""
    if uses_native(terms[0].x) and ranges:
        return gemm.nodes(_sources(terms), ranges)
    if not ranges:
        matrix = terms[0].operand.matrix()
        return terms[0].x.new_empty((0, terms[0].x.shape[0], matrix.shape[0]), dtype=torch.float32)
    return torch.stack([_torch_node(terms, lo, hi).float() for lo, hi in ranges])


def reduced_product(
    terms: Sequence[Term],
    shards: VirtualShards,
    group: Group,
    bias: Tensor | None = None,
) -> Tensor:
    """The product summed over every rank's leaves, then + bias: one collective, none in a group of one."""
    dtype = terms[0].x.dtype
    if group.size == 1:
        return product(terms, bias, dtype=dtype)
    if group.numerics == "fast":
        total = group.talk.sum(product(terms, dtype=dtype))
        return total if bias is None else total + bias.to(dtype)
    ranges = shards.local_nodes(group.rank)
    x, num_outputs = terms[0].x, terms[0].operand.num_outputs
    slot = group.talk.slot(len(ranges) * x.shape[0] * num_outputs * 4) if uses_native(x) else None
    if slot is None:
        return group.talk.tree_sum(nodes(terms, ranges), shards.tree, bias=bias, dtype=dtype)
    if ranges:  # none on a rank without leaves (8 ranks, 5 heads): it only takes part in the collective
        gemm.nodes(_sources(terms), ranges, out=slot)  # straight into shared memory
    return group.talk.tree_sum_in_place((x.shape[0], num_outputs), shards.tree, bias=bias, dtype=dtype)


def outer_product(grad_TN: Tensor, x_TK: Tensor, out: Tensor | None = None) -> Tensor:
    """grad^T x, [N, K]: a weight's gradient, summed over tokens in one chain. Native: into `out` where given, in its
    type.
    """
    if uses_native(grad_TN):
        packed = PackedMatrix.pack(x_TK.t(), place=memory.scratch.take)
        return gemm.product([gemm.Source(grad_TN.t(), packed, (0, grad_TN.shape[0]))], out=out)
    assert out is None, "asked of the native kernels only"
    return grad_TN.t() @ x_TK


def column_sum(grad_TN: Tensor) -> Tensor:
    """The sum over tokens, [N]: a bias's gradient. Native: in the order of the tokens."""
    return elementwise.column_sums(grad_TN) if uses_native(grad_TN) else grad_TN.sum(0)


def leaf_tree(leaves_LT: Tensor, ranges: Sequence[Range]) -> Tensor:
    """Adds precomputed leaves [L, ...] into the roots of the given subtrees: [len(ranges), ...]."""
    roots = [leaves_sum(leaves_LT[lo:hi].unbind()) for lo, hi in ranges]
    return torch.stack(roots) if roots else leaves_LT.new_empty((0, *leaves_LT.shape[1:]))


def _sources(terms: Sequence[Term]) -> list[gemm.Source]:
    return [gemm.Source(term.x, term.operand.packed(), term.operand.borders) for term in terms]


def _torch_node(terms: Sequence[Term], lo: int, hi: int) -> Tensor:
    if hi - lo > 1:
        mid = middle(lo, hi)
        return _torch_node(terms, lo, mid).float() + _torch_node(terms, mid, hi).float()
    leaf = None
    for term in terms:
        if hi > lo:
            addend = term.operand.leaf_product(term.x, lo)
        else:
            addend = functional.linear(term.x[:, :0], term.operand.matrix()[:, :0])
        leaf = addend if leaf is None else leaf + addend
    assert leaf is not None, "a product needs at least one term"
    return leaf
