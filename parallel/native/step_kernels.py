"""What a forward does between its kernels, as kernels: the wrappers of step_kernels.cpp.

They serve a step that is recorded (parallel/replay), where they stand for the operations of torch whose bits they have:
a sum or a scaled element is computed in float32 and rounded once. No autograd.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from parallel.native.compiled.library import entry
from parallel.native.operands import NUMBERS, checked, number, refused, succeeded, words

MOST_DIMENSIONS = 4  # of what `copied` reads
_ADD, _ADD_SCALAR, _SCALE, _CLAMP = range(4)  # Op of step_kernels.cpp
_MAP, _GATHER = struct.Struct("6q2d"), struct.Struct("6q")
_COPY, _SHARD, _OWN_ROWS = struct.Struct("12q"), struct.Struct("5q"), struct.Struct("7q")


def added(a: Tensor, b: Tensor) -> Tensor:
    """a + b, of one type and shape."""
    b = checked("add", "b", b, a.shape, a.dtype)
    return _mapped(_ADD, a, b)


def added_scalar(a: Tensor, scalar: float) -> Tensor:
    """a + scalar."""
    return _mapped(_ADD_SCALAR, a, None, scalar)


def scaled(a: Tensor, scalar: float) -> Tensor:
    """a * scalar."""
    return _mapped(_SCALE, a, None, scalar)


def clamped(a: Tensor, low: float, high: float) -> Tensor:
    """a within low and high."""
    return _mapped(_CLAMP, a, None, low, high)


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """table[index], whole rows; an index outside of it is refused. The table contiguous, the index int64 [rows]."""
    name = "rows"
    if index.dim() != 1 or table.dim() < 1 or not table.is_contiguous() or not table.is_cpu:
        raise refused(
            name, "table", words(table), f"a contiguous one is needed, and a list of rows, not {words(index)}"
        )
    index = checked(name, "index", index, (len(index),), torch.int64)
    out = torch.empty((len(index), *table.shape[1:]), dtype=table.dtype)
    row_bytes = table[0].numel() * table.element_size() if len(table) else 0
    given = len(index), len(table), row_bytes, table.data_ptr(), index.data_ptr(), out.data_ptr()
    _call("step_gather", _GATHER.pack(*given))
    return out


def shard_rows(ids_T: Tensor, first: int, stop: int) -> Tensor:
    """[T] where the rows `ids_T` (int64) stand in the rows first..stop - 1 of a table; any of these for others."""
    ids_T = checked("shard_rows", "ids", ids_T, (len(ids_T),), torch.int64)
    if first >= stop:
        raise refused("shard_rows", "first", f"{first} with stop {stop}", "a shard without rows has none to look up")
    out = torch.empty(len(ids_T), dtype=torch.int64)
    _call("step_shard", _SHARD.pack(len(ids_T), first, stop, ids_T.data_ptr(), out.data_ptr()))
    return out


def own_rows(rows_TD: Tensor, ids_T: Tensor, first: int, stop: int) -> Tensor:
    """[T, D]: the rows whose id is first..stop - 1; zeros in the others' place."""
    rows_TD = checked("own_rows", "rows", rows_TD, (len(ids_T), *rows_TD.shape[1:]), *NUMBERS)
    ids_T = checked("own_rows", "ids", ids_T, (len(ids_T),), torch.int64)
    out = torch.empty(rows_TD.shape, dtype=rows_TD.dtype)
    row_bytes = rows_TD.shape[1:].numel() * rows_TD.element_size()
    given = len(ids_T), row_bytes, first, stop, ids_T.data_ptr(), rows_TD.data_ptr(), out.data_ptr()
    _call("step_own_rows", _OWN_ROWS.pack(*given))
    return out


def copied(a: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy, of another type where asked for."""
    if a.dim() > MOST_DIMENSIONS or dtype not in NUMBERS:
        raise refused("copy", "a", words(a), f"at most {MOST_DIMENSIONS} dimensions to {list(NUMBERS)}, not to {dtype}")
    kind, short = number("copy", "a", a), MOST_DIMENSIONS - a.dim()
    out = torch.empty(a.shape, dtype=dtype)
    sizes, strides = (1,) * short + tuple(a.shape), (0,) * short + a.stride()
    _call("step_copy", _COPY.pack(kind, NUMBERS[dtype], *sizes, *strides, a.data_ptr(), out.data_ptr()))
    return out


def _mapped(op: int, a: Tensor, b: Tensor | None, low: float = 0.0, high: float = 0.0) -> Tensor:
    dtype = number("map", "a", a)
    a = a.contiguous()
    out = torch.empty(a.shape, dtype=a.dtype)
    other = 0 if b is None else b.data_ptr()
    _call("step_map", _MAP.pack(op, dtype, a.numel(), a.data_ptr(), other, out.data_ptr(), low, high))
    return out


@cache
def _function(name: str) -> Callable[..., int]:
    return entry(name, (ctypes.c_char_p,), ctypes.c_int, keep_lock=True)


def _call(name: str, block: bytes) -> None:
    if status := _function(name)(block):
        succeeded(name, status)
