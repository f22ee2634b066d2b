"""Products on CPUs that have no C++ compiler: oneDNN's packed weights, through torch.

More than twice as fast as torch's default in float32 on many CPUs, and a row's bits do not depend on the rows beside
it, with three exceptions that are worked around here: a lone row over a long reduction (so it is computed as two, and
reductions go in pieces of at most 1024, added in float32 in order), outputs of a few columns (so they are padded to
16), and 16-bit types, for which oneDNN chooses among kernels by the number of rows where the CPU multiplies tiles (so
every call has 32). Seen: single rows differ from K = 1600 on, five columns from K = 2048; with AMX rows of bfloat16
from N = 64, K = 1024 on, and among calls of one size never. The operators are torch's private ones, so this is the only
file that names them.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

LONGEST = 1024
NARROWEST = 16
LOOKS = 16
"""Elements of a weight that are compared with what was packed, before each product."""
ROWS_HINT = 16
"""The number of rows that the packed layout is chosen for: one for all, or the layout, and the bits, would differ."""
BLOCK = 32
"""Rows of every call in a 16-bit type."""


@cache
def available() -> bool:
    """Whether this torch has oneDNN and the packed operators."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


class PackedLeaf:
    """One leaf of a weight, [N, K], packed in pieces of K."""

    def __init__(self, matrix_NK: Tensor) -> None:
        self.num_outputs, size = matrix_NK.shape
        step = max(1, matrix_NK.numel() // LOOKS)
        self._places = torch.arange(step // 2, matrix_NK.numel(), step)[:LOOKS]
        self._seen = self._look(matrix_NK)
        padded = functional.pad(matrix_NK, (0, 0, 0, max(0, NARROWEST - self.num_outputs)))
        count = -(-size // LONGEST)
        borders = [size * i // count for i in range(count + 1)]
        self.pieces = [
            (start, stop, torch.ops.mkldnn._reorder_linear_weight(padded[:, start:stop].contiguous(), ROWS_HINT))
            for start, stop in itertools.pairwise(borders)
        ]

    def _look(self, matrix_NK: Tensor) -> Tensor:
        """The bits of a few elements, evenly spread."""
        width = max(1, matrix_NK.shape[1])
        bits = torch.int32 if matrix_NK.dtype is torch.float32 else torch.int16
        return matrix_NK[self._places // width, self._places % width].view(bits)

    def differs(self, matrix_NK: Tensor) -> bool:
        """Whether those have changed: a write to all of the matrix that PyTorch did not count."""
        return not torch.equal(self._look(matrix_NK), self._seen)

    def product(self, x_TK: Tensor) -> Tensor:
        """x W^T over this leaf: [T, N], float32 where it has several pieces, else in x's type."""
        rows = x_TK.shape[0]
        if x_TK.dtype is torch.float32:
            blocks = [x_TK.expand(2, -1) if rows == 1 else x_TK]
        else:
            blocks = list(functional.pad(x_TK, (0, 0, 0, -rows % BLOCK)).split(BLOCK))
        total: Tensor | None = None
        for start, stop, packed in self.pieces:
            parts = [_product(block[:, start:stop].contiguous(), packed) for block in blocks]
            part = parts[0] if len(parts) == 1 else torch.cat(parts)
            total = part if total is None else total.float() + part.float()
        assert total is not None, "a leaf has at least one piece"
        return total[:rows, : self.num_outputs].contiguous()


def _product(x_TK: Tensor, packed: Tensor) -> Tensor:
    part: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, packed, None, "none", [], "")
    return part
