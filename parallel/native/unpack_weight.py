"""A packed weight's values back: all, or some rows. What is read here is the layout of gemm_pack.cpp."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from parallel.native.packed_weight import PANEL, UNIT, PackedMatrix


def unpack(packed: PackedMatrix) -> Tensor:
    """The matrix [N, K] that was packed, the same bits; a new contiguous tensor."""
    per_unit = UNIT // packed.dtype.itemsize
    panels = packed.storage.view(packed.dtype).view(-1, packed.units, PANEL, per_unit)
    rows = panels.permute(0, 2, 1, 3).reshape(-1, packed.units * per_unit)[: packed.n]
    spans = [
        (start * per_unit, end - begin)
        for start, (begin, end) in zip(packed.starts, itertools.pairwise(packed.borders), strict=True)
    ]
    if packed.units * per_unit == packed.k:
        return rows
    return torch.cat([rows[:, start : start + width] for start, width in spans], 1)


def unpack_rows(packed: PackedMatrix, ids_T: Tensor) -> Tensor:
    """[T, K]: the rows of these numbers, the same bits."""
    if len(ids_T) and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < packed.n:
        raise IndexError(f"rows {int(ids_T.min())} to {int(ids_T.max())} of a matrix of {packed.n}")
    few = PackedMatrix(len(ids_T), packed.k, packed.dtype, packed.borders)
    panels, made = (matrix.storage.view(torch.int32).view(-1, packed.units, PANEL) for matrix in (packed, few))
    for panel, first in enumerate(range(0, len(ids_T), PANEL)):
        ids = ids_T[first : first + PANEL]
        made[panel, :, : len(ids)] = panels[ids // PANEL, :, ids % PANEL].t()
    return unpack(few)
