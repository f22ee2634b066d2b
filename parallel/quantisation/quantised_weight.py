"""A quantised weight [N, K] (numbers.py) packed for the products of native/gemm.py, by src/quantised.cpp.

Layout, leaves and what a product asks of a weight are those of PackedMatrix. It follows nothing: it is the weight.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from parallel.native.compiled.library import entry
from parallel.native.memory import Place
from parallel.native.operands import Status, checked, succeeded
from parallel.native.packed_weight import PANEL, Panels
from parallel.quantisation.numbers import Numbers

_FORM = struct.Struct("5q")  # Quantised of quantised.h
_MATRIX = struct.Struct("6q")  # Form of quantised.cpp, after its Quantised
_LOOKUP = struct.Struct("5q")  # QuantisedLookup
LINES = 32  # elements of a block


class QuantisedMatrix(Panels):
    """Such a weight, packed. Its type to the outside is bfloat16: that of the x it is multiplied with."""

    def __init__(self, made: Numbers, borders: Sequence[int] | None = None, place: Place | None = None) -> None:
        n, k = made.numbers.shape
        super().__init__(
            n, k, torch.bfloat16, tuple(sorted({0, k, *(borders or ())})), PANEL * 2 * made.bits // 8, place
        )
        self.bits = made.bits
        panels = -(-n // PANEL)
        self.scales = _by_panel(made.scales, panels)
        self.zeros = self.groups = None
        if made.zeros is not None and made.groups is not None:
            self.zeros, self.groups = _by_panel(made.zeros, panels), self._lines(made.groups)
        self.quantisation = 1 if self.groups is None else 2
        form = _FORM.pack(
            made.bits, 0 if self.groups is None else len(made.scales), self.scales.data_ptr(), _address(self.zeros),
            _address(self.groups),
        )  # fmt: skip
        leaves = _MATRIX.pack(n, k, self.units, len(self.starts), ctypes.addressof(self.leaves), self.address)
        self._form = ctypes.create_string_buffer(form + leaves)
        self.form = ctypes.addressof(self._form)
        numbers = made.numbers if made.numbers.stride(1) == 1 or k == 1 else made.numbers.contiguous()
        if numbers.numel():
            succeeded("pack", _packer()(self.form, numbers.data_ptr(), numbers.stride(0)))

    def rows(self, ids_T: Tensor) -> Tensor:
        """[T, K] bfloat16: the rows of these numbers (int64). IndexError for one that the matrix has not."""
        ids_T = checked("rows", "ids", ids_T, ids_T.shape[:1], torch.int64)
        return self._read(len(ids_T), ids_T, torch.bfloat16)

    def values(self) -> Tensor:
        """[N, K] bfloat16, a new tensor."""
        return self._read(self.n, None, torch.bfloat16)

    def numbers(self) -> Numbers:
        """What was packed."""
        scales = self.scales.permute(1, 0, 2).reshape(self.scales.shape[1], -1)[:, : self.n].contiguous()
        zeros = groups = None
        if self.zeros is not None and self.groups is not None:
            zeros = self.zeros.permute(1, 0, 2).reshape(len(scales), -1)[:, : self.n].contiguous()
            groups = self.groups[self._places()]
        return Numbers(self.bits, self._read(self.n, None, torch.int8), scales, zeros, groups)

    @property
    def nbytes(self) -> int:
        """Bytes held, scales and padding included."""
        more = (self.scales, self.zeros, self.groups)
        return super().nbytes + sum(tensor.nbytes for tensor in more if tensor is not None)

    def _read(self, count: int, ids: Tensor | None, dtype: torch.dtype) -> Tensor:
        out = torch.empty(count, self.k, dtype=dtype)
        if not out.numel():
            return out
        status = _reader()(_LOOKUP.pack(self.form, _address(ids), count, dtype is torch.int8, out.data_ptr()))
        if status == Status.BAD_INDEX and ids is not None:
            raise IndexError(f"rows {int(ids.min())} to {int(ids.max())} of a matrix of {self.n}")
        succeeded("rows", status)
        return out

    def _places(self) -> Tensor:
        """The line of each element of K."""
        places = []
        for begin, end, start in zip(self.borders, self.borders[1:], self.starts, strict=False):
            k = torch.arange(end - begin)
            within = k % LINES
            places.append(2 * start + k - within + within % 2 * (LINES // 2) + within // 2)
        return torch.cat(places)

    def _lines(self, groups_K: Tensor) -> Tensor:
        lines = torch.zeros(2 * self.units, dtype=torch.int32)
        lines[self._places()] = groups_K
        return lines


def _by_panel(rows_GN: Tensor, panels: int) -> Tensor:
    """[panels, G, 64], zeros beyond N."""
    padded = torch.zeros(len(rows_GN), panels * PANEL, dtype=rows_GN.dtype)
    padded[:, : rows_GN.shape[1]] = rows_GN
    return padded.view(len(rows_GN), panels, PANEL).permute(1, 0, 2).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@cache
def _packer() -> Callable[..., int]:
    return entry("quantised_pack", (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), ctypes.c_int)


@cache
def _reader() -> Callable[..., int]:
    return entry("quantised_rows", (ctypes.c_char_p,), ctypes.c_int)
