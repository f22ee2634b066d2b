"""Some rows of a packed weight back, by their numbers (gemm_rows.cpp); PackedMatrix.unpack gives all of it."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from parallel.native.compiled.library import entry
from parallel.native.operands import Status, checked, succeeded
from parallel.native.packed_weight import PackedMatrix

_LOOKUP = struct.Struct("10q")  # Lookup of gemm_rows.cpp


def unpack_rows(packed: PackedMatrix, ids_T: Tensor) -> Tensor:
    """[T, K]: the rows of these numbers (int64), the same bits. IndexError for one that the matrix has not."""
    ids_T = checked("unpack_rows", "ids", ids_T, ids_T.shape[:1], torch.int64)
    out = torch.empty(len(ids_T), packed.k, dtype=packed.dtype)
    status = _function()(
        _LOOKUP.pack(
            packed.number, packed.n, packed.k, packed.units, len(packed.starts), len(ids_T), packed.address,
            ctypes.addressof(packed.leaves), ids_T.data_ptr(), out.data_ptr(),
        )
    )  # fmt: skip
    if status == Status.BAD_INDEX:
        raise IndexError(f"rows {int(ids_T.min())} to {int(ids_T.max())} of a matrix of {packed.n}")
    succeeded("unpack_rows", status)
    return out


@cache
def _function() -> Callable[..., int]:
    return entry("gemm_unpack_rows", (ctypes.c_char_p,), ctypes.c_int)
