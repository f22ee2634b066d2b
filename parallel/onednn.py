"""Products on CPUs that have no C++ compiler: oneDNN's packed weights, through torch.

More than twice as fast as torch's default in float32 on many CPUs, and a row's bits do not depend on the rows beside
it, with two exceptions that are worked around here: a lone row over a long reduction (so it is computed as two, and
reductions go in pieces of at most 1024, added in float32 in order), and outputs of a few columns (so they are padded to
16). Seen: single rows differ from K = 1600 on, five columns from K = 2048. The operators are torch's private ones, so
this is the only file that names them.
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
        if rows == 1:
            x_TK = x_TK.expand(2, -1)
        total: Tensor | None = None
        for start, stop, packed in self.pieces:
            piece = x_TK[:, start:stop].contiguous()
            part = torch.ops.mkldnn._linear_pointwise(piece, packed, None, "none", [], "")
            total = part if total is None else total.float() + part.float()
        assert total is not None, "a leaf has at least one piece"
        return total[:rows, : self.num_outputs].contiguous()
