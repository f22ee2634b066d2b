"""Dropout of matrix rows by keyed masks: the wrapper of dropout.cpp, and the structures other kernels read masks from.

No autograd and no choice of keys here (parallel/dropout.py).
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from parallel.native.library import library


class Chance(ctypes.Structure):
    """dropout::Chance of dropout.h."""

    _fields_ = (("threshold", ctypes.c_uint32), ("scale", ctypes.c_float))


class Heads(ctypes.Structure):
    """dropout::Heads of dropout.h; whoever makes one keeps the tensors alive."""

    _fields_ = (("chance", Chance), ("tokens", ctypes.c_void_p), ("heads", ctypes.c_void_p))


def drop_rows(x_TD: Tensor, keys_T: Tensor, first_column: int, threshold: int, scale: float) -> Tensor:
    """x [T, D] float32 or bfloat16 on the CPU, its elements times 0 or the scale; keys int64."""
    x_TD, keys_T = x_TD.contiguous(), keys_T.contiguous()
    out = torch.empty_like(x_TD)
    rows, width = x_TD.shape
    _rows()(
        x_TD.dtype is torch.bfloat16, rows, width, x_TD.data_ptr(), keys_T.data_ptr(), first_column,
        Chance(threshold, scale), out.data_ptr(),
    )  # fmt: skip
    return out


@cache
def _rows() -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    function = library().dropout_rows
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (ctypes.c_int, size, size, pointer, pointer, size, Chance, pointer)
    function.restype = None
    return function
