"""Matrix products y = x W^T on CPUs whose bits do not depend on rows, columns, ranks or threads around an element.

W is packed once (packed_weight.py). K is cut at the borders of the leaves. In float32 a leaf is one chain of fused
multiply-adds; in bfloat16 it is summed in the order `amx32`, block by block of 32 elements (src/bf16_order.h), the same
on every CPU. Leaves are added by the fixed tree node(lo, hi) = node(lo, mid) + node(mid, hi), in float32.
No autograd, no collectives: parallel/layers/linear.py builds those on top.
"""

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, overload

import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.native.compiled.library import entry
from parallel.native.elementwise import activation_id
from parallel.native.operands import DTYPES, NUMBERS, Status, apart, checked, number, refused, succeeded, words, written
from parallel.native.packed_weight import Panels, block_of

MAX_SOURCES = 16
MOST_LOOKS = 8  # times that a product takes over a matrix that is written to while it looks
_SMALL = 1 << 24  # multiply-adds below which a call keeps the interpreter lock
_strided = torch.strided


class Source(NamedTuple):
    """One product x W^T whose K is cut into leaves at `borders` (n_leaves + 1 ascending numbers)."""

    x: Tensor
    weight: Panels
    borders: tuple[int, ...]


def product(
    sources: Sequence[Source],
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The sum over all sources [M, N]: leaves in one tree, + bias in float32, rounded, then the activation, rounded.

    Leaf i is one sum through every source's range i in turn; in bfloat16 each range begins a block.
    out_dtype: the sources' own unless given. Into `out` where given, in its type.
    """
    plan = _plan(sources, None)
    first = sources[0]
    m, n = _rows(first.x), first.weight.n
    if out is None:
        out = torch.empty(m, n, dtype=out_dtype or first.weight.dtype)
    else:
        apart("product", "out", written("product", "out", out, (m, n), *DTYPES), bias, *(s.x for s in sources))
    _run(plan, sources, m, out.data_ptr(), out.dtype, 0, bias, activation)
    return out


@overload
def nodes(sources: Sequence[Source], node_ranges: Sequence[tuple[int, int]], out: Tensor | None = None) -> Tensor: ...
@overload
def nodes(sources: Sequence[Source], node_ranges: Sequence[tuple[int, int]], out: int) -> int: ...
def nodes(
    sources: Sequence[Source], node_ranges: Sequence[tuple[int, int]], out: Tensor | int | None = None
) -> Tensor | int:
    """The root of each complete subtree (lo, hi), float32 [len(node_ranges), M, N], no bias; into `out` where given
    (a contiguous float32 tensor, or an address that Comm.slot gave)."""
    plan = _plan(sources, tuple(node_ranges))
    m, n = _rows(sources[0].x), sources[0].weight.n
    shape = (len(node_ranges), m, n)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32)
    elif isinstance(out, Tensor):
        apart("nodes", "out", written("nodes", "out", out, shape, torch.float32), *(s.x for s in sources))
    _run(plan, sources, m, out if isinstance(out, int) else out.data_ptr(), torch.float32, m * n, None, None)
    return out


_PLAN = struct.Struct("6q")  # Plan, Run and Call of gemm.cpp
_RUN = struct.Struct("10q")


@cache
def _call_struct(n_sources: int) -> struct.Struct:
    return struct.Struct(f"{8 + 4 * n_sources}q")


@cache
def _function(small: bool) -> Callable[..., int]:
    return entry("gemm_run", (ctypes.c_char_p, ctypes.c_char_p), ctypes.c_int, keep_lock=small)


def _run(
    plan: bytes,
    sources: Sequence[Source],
    m: int,
    out: int,
    out_dtype: torch.dtype,
    root_stride: int,
    bias: Tensor | None,
    activation: str | None,
) -> None:
    first = sources[0].weight
    n, known = first.n, first.number
    out_number = known if out_dtype is first.dtype else NUMBERS.get(out_dtype, 0)
    if not out_number:
        raise ConfigError(f"out_dtype is {out_dtype}; the native product writes float32 or bfloat16")
    grad = torch.is_grad_enabled()
    address = bias_number = 0
    if bias is not None:
        if not bias.is_cpu or bias.layout is not _strided or bias.shape != (n,) or not bias.is_contiguous():
            bias = checked("product", "bias", bias, (n,), *DTYPES)
        bias_number = known if bias.dtype is first.dtype else NUMBERS.get(bias.dtype, 0)
        if not bias_number or (grad and bias.requires_grad):
            number("product", "bias", bias)
        address = bias.data_ptr()
    activated = 0 if activation is None else activation_id(activation)
    fields = [m, out, out_number, n, root_stride, address, bias_number, activated]
    keep = []
    for x, weight, _ in sources:
        if x.dtype is not weight.dtype or not x.is_cpu or x.layout is not _strided or (grad and x.requires_grad):
            number("product", "x", x)
        if x.dtype is not weight.dtype or x.shape != (m, weight.k):
            raise ConfigError(
                f"x is {words(x)}; with this weight it must be [{m}, {weight.k}] {weight.dtype} on the CPU"
            )
        rows, k = x.stride()
        if k != 1 and rows != 1 and weight.k > 1:
            x = x.contiguous()
            keep.append(x)
            rows, k = x.stride()
        fields += x.data_ptr(), rows, 1 if weight.k < 2 else k, weight.watch
    small = m * n * first.k < _SMALL
    call = _call_struct(len(sources)).pack(*fields)
    if status := _function(small)(call, plan):
        succeeded("product", _again(status, sources, call, plan, small))


def _rows(x: Tensor) -> int:
    shape = x.shape
    if len(shape) != 2:
        raise refused("product", "x", words(x), "it must be [rows, columns]")
    return shape[0]


def _again(status: int, sources: Sequence[Source], call: bytes, plan: bytes, small: bool) -> int:
    """The status after stale weights were packed again, if that is what was wrong."""
    for _ in range(MOST_LOOKS):
        if status != Status.STALE:
            break
        for _, weight, _ in sources:
            weight.catch_up()
        status = _function(small)(call, plan)
    return status


def _plan(sources: Sequence[Source], roots: tuple[tuple[int, int], ...] | None) -> bytes:
    """The run list for these weights, borders and roots, remembered with the first weight."""
    if len(sources) == 1:
        _, weight, borders = sources[0]
        key: tuple = (borders, roots)
    else:
        if not sources:
            raise ConfigError("a product needs at least one source")
        weight = sources[0].weight
        key = (*((source.weight.serial, source.borders) for source in sources), roots)
    plan = weight.plans.get(key)
    if plan is None:
        plan = weight.plans[key] = _make_plan(sources, roots)
    return plan


def _make_plan(sources: Sequence[Source], roots: tuple[tuple[int, int], ...] | None) -> bytes:
    _check(sources)
    n_leaves = len(sources[0].borders) - 1
    runs, depth = [], 1
    for root, (lo, hi) in enumerate(roots if roots is not None else ((0, n_leaves),), 1):
        if not 0 <= lo <= hi <= n_leaves:
            raise ConfigError(f"node ({lo}, {hi}) is not a range of the {n_leaves} leaves")
        pops = _pops(lo, hi)
        depth = max(depth, len(pops).bit_length() + 1)
        for leaf, pop in pops:
            runs += _leaf_runs(sources, leaf, pop, root if leaf == hi - 1 or leaf < 0 else 0)
    first, quantisation = sources[0].weight, max(source.weight.quantisation for source in sources)
    depth += 1 if quantisation else 0  # the sum of a quantised source, beside what the leaf held before it
    head = _PLAN.pack(first.number, len(runs), depth, len(sources), first.n, quantisation)
    return head + b"".join(runs) + b"".join(_copy_plan(s.weight) for s in sources)


def _pops(lo: int, hi: int) -> list[tuple[int, int]]:
    """For each leaf of node (lo, hi), left to right, how many finished subtrees are added once its chain is done."""
    if hi == lo:
        return [(-1, 0)]  # an empty sum: one chain of nothing
    if hi - lo == 1:
        return [(lo, 0)]
    mid = lo + (hi - lo + 1) // 2
    *left, (last, pops) = _pops(mid, hi)
    return [*_pops(lo, mid), *left, (last, pops + 1)]


def _leaf_runs(sources: Sequence[Source], leaf: int, pops: int, root: int) -> list[bytes]:
    """One run per source; an interrupted sum goes on in the next one."""
    runs = []
    for index, (_, weight, borders) in enumerate(sources):
        begin, end = (borders[leaf], borders[leaf + 1]) if leaf >= 0 else (0, 0)
        unit = _unit_of(weight, begin, end) if end > begin else 0
        last = index == len(sources) - 1
        runs.append(
            _RUN.pack(
                index,
                weight.units_of(end - begin),
                begin,
                unit,
                weight.address + unit * weight.unit_bytes,
                weight.panel_bytes,
                index == 0,
                pops if last else -1,
                root if last else 0,
                weight.form,
            )
        )
    return runs


def _unit_of(weight: Panels, begin: int, end: int) -> int:
    """Where in the packed K the leaf begin..end starts; it must not share a block of bfloat16 with a neighbour."""
    block = block_of(weight.dtype)
    index = max(i for i, border in enumerate(weight.borders[:-1]) if border <= begin)
    stop = weight.borders[index + 1]
    if (begin - weight.borders[index]) % block or end > stop or ((end - begin) % block and end != stop):
        raise ConfigError(
            f"a leaf {begin}..{end} of a {weight.dtype} weight packed with borders {weight.borders} splits a "
            f"block of {block} elements; pass the leaves' borders to PackedMatrix.pack"
        )
    return weight.starts[index] + weight.units_of(begin - weight.borders[index])


def _check(sources: Sequence[Source]) -> None:
    first = sources[0]
    if len(sources) > MAX_SOURCES:
        raise ConfigError(f"{len(sources)} sources; a product takes at most {MAX_SOURCES}")
    for _, weight, borders in sources:
        if weight.n != first.weight.n or weight.dtype != first.weight.dtype or len(borders) != len(first.borders):
            raise ConfigError(
                f"sources of one product share N, dtype and number of leaves; got [{weight.n}, {weight.k}] "
                f"{weight.dtype} with {len(borders) - 1} leaves beside [{first.weight.n}, {first.weight.k}] "
                f"{first.weight.dtype} with {len(first.borders) - 1}"
            )
        if not borders or list(borders) != sorted(borders) or borders[0] < 0 or borders[-1] > weight.k:
            raise ConfigError(f"borders {borders} must ascend within 0..{weight.k}")


def _copy_plan(weight: Panels) -> bytes:
    return struct.pack("2q", weight.units, len(weight.starts)) + bytes(weight.leaves)
