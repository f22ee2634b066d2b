"""Some rows of a packed weight back, from the layout of gemm_pack.cpp; PackedMatrix.unpack gives all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.native.packed_weight import PANEL, PackedMatrix


def unpack_rows(packed: PackedMatrix, ids_T: Tensor) -> Tensor:
    """[T, K]: the rows of these numbers, the same bits."""
    if len(ids_T) and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < packed.n:
        raise IndexError(f"rows {int(ids_T.min())} to {int(ids_T.max())} of a matrix of {packed.n}")
    few = PackedMatrix(len(ids_T), packed.k, packed.dtype, packed.borders)
    panels, made = (matrix.storage.view(torch.int32).view(-1, packed.units, PANEL) for matrix in (packed, few))
    for panel, first in enumerate(range(0, len(ids_T), PANEL)):
        ids = ids_T[first : first + PANEL]
        made[panel, :, : len(ids)] = panels[ids // PANEL, :, ids % PANEL].t()
    return few.unpack()
