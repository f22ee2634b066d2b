"""Dropout of matrix rows by keyed masks: the wrapper of dropout.cpp, and the structures other kernels read masks from.

No autograd and no choice of keys here (parallel/layers/dropout.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.native.compiled.library import entry
from parallel.native.operands import checked, number, refused, succeeded, words


class Chance(ctypes.Structure):
    """dropout::Chance of dropout.h."""

    _fields_ = (("threshold", ctypes.c_uint32), ("scale", ctypes.c_float))


class Heads(ctypes.Structure):
    """dropout::Heads of dropout.h; whoever makes one keeps the tensors alive."""

    _fields_ = (("chance", Chance), ("tokens", ctypes.c_void_p), ("heads", ctypes.c_void_p))


def drop_rows(x_TD: Tensor, keys_T: Tensor, first_column: int, threshold: int, scale: float) -> Tensor:
    """x [T, D] float32 or bfloat16 on the CPU, its elements times 0 or the scale; keys int64."""
    dtype = number("drop_rows", "x", x_TD)
    if x_TD.dim() != 2:
        raise refused("drop_rows", "x", words(x_TD), "a matrix [tokens, columns] is needed")
    rows, width = x_TD.shape
    x_TD, keys_T = x_TD.contiguous(), checked("drop_rows", "keys", keys_T, (rows,), torch.int64)
    if not 0 <= first_column <= first_column + width <= 1 << 32:
        raise ConfigError(f"drop_rows: columns from {first_column} on, {width} of them; masks number them in 32 bits")
    out = torch.empty(rows, width, dtype=x_TD.dtype)
    status = _rows()(
        dtype, rows, width, x_TD.data_ptr(), keys_T.data_ptr(), first_column, Chance(threshold, scale), out.data_ptr()
    )
    succeeded("drop_rows", status)
    return out


@cache
def _rows() -> Callable[..., int]:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    return entry("dropout_rows", (ctypes.c_int, size, size, pointer, pointer, size, Chance, pointer), ctypes.c_int)
