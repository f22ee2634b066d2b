"""A weight packed for the matrix products of gemm.py (gemm_pack.cpp), and its watch over what it was made from."""

import ctypes
import itertools
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import NoReturn

import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.native.compiled.library import entry
from parallel.native.memory import Place, heap
from parallel.native.operands import NUMBERS, number, succeeded, words

PANEL = 64  # columns of W in a panel
UNIT = 4  # bytes of K that go together: a float32 or two bfloat16
BLOCK = 32  # elements of K that a bfloat16 sum takes at once (bf16_order.h); a leaf is filled up with zeros
_serials = itertools.count()
_WATCH = struct.Struct("11q")  # Watch of gemm_watch.h


class Panels:
    """How a weight W [N, K] of a product lies in memory: panels of 64 columns, [ceil(N/64)][units of K][64], K cut at
    the leaves' borders. `unit_bytes`: of one unit (two elements of bfloat16, one of float32) in a panel.
    """

    watch = 0
    """The address of a Watch of gemm_watch.h, or 0."""
    form = 0
    """The address of a Quantised of quantised.h, or 0 for plain numbers."""
    quantisation = 0
    """Of quantised.h: what products have to do, 0 for plain numbers."""

    def __init__(
        self, n: int, k: int, dtype: torch.dtype, borders: tuple[int, ...], unit_bytes: int, place: Place | None
    ) -> None:
        self.n, self.k, self.dtype, self.borders = n, k, dtype, borders
        self.number, self.unit_bytes = NUMBERS[dtype], unit_bytes
        starts = [0]
        for begin, end in itertools.pairwise(borders):
            starts.append(starts[-1] + self.units_of(end - begin))
        self.starts, self.units = tuple(starts[:-1]), starts[-1]
        self.panel_bytes = self.units * unit_bytes
        self.storage = (place or heap)(-(-n // PANEL) * self.panel_bytes)
        self.address = self.storage.data_ptr()
        self.serial = next(_serials)
        self.plans: dict[tuple, bytes] = {}
        self.leaves = leaves_of(self)

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a packed matrix is known by its address and cannot be copied or pickled; pack its source anew"
        )

    def units_of(self, elements: int) -> int:
        """Units that so many elements of K take from a leaf's beginning on, zeros at its end included."""
        return units_of(elements, self.dtype)

    def catch_up(self) -> None:
        """Takes over what a watched matrix holds now; nothing where none is."""

    @property
    def nbytes(self) -> int:
        """Bytes held, padding included."""
        return self.storage.numel()


class PackedMatrix(Panels):
    """A weight W [N, K] laid out for streaming, [N/64][K][64]; a copy that follows its source only by repack()."""

    def __init__(
        self, n: int, k: int, dtype: torch.dtype, borders: tuple[int, ...], place: Place | None = None
    ) -> None:
        super().__init__(n, k, dtype, borders, PANEL * UNIT, place)
        self._matrix: Callable[[], Tensor] | None = None  # what is watched
        self._watch = ctypes.create_string_buffer(_WATCH.size)  # one for good: another thread may be reading it

    @classmethod
    def pack(cls, src: Tensor, borders: Sequence[int] | None = None, place: Place | None = None) -> "PackedMatrix":
        """Pack src [N, K], any strides. `borders`: the leaves' borders, needed only where a bfloat16 leaf does not
        begin and end with a block.
        `place`: where the packed bytes live; the heap unless given (see native.memory).
        """
        packed = cls.made_for(src, borders, place)
        packed.repack(src)
        return packed

    @classmethod
    def made_for(cls, src: Tensor, borders: Sequence[int] | None = None, place: Place | None = None) -> "PackedMatrix":
        """Room for such a matrix, nothing in it yet."""
        number("pack", "the matrix", src.detach())
        if src.dim() != 2:
            raise ConfigError(f"cannot pack {words(src)}; give a [N, K] float32 or bfloat16 tensor on the CPU")
        n, k = src.shape
        cuts = tuple(sorted({0, k, *(borders or ())}))
        if cuts[0] < 0 or cuts[-1] > k:
            raise ConfigError(f"borders {tuple(borders or ())} leave the range 0..{k} of K; give borders inside it")
        return cls(n, k, src.dtype, cuts, place)

    def repack(self, src: Tensor) -> None:
        """Take over src's present values, in place."""
        src = src.detach()
        dtype = number("pack", "the matrix", src)
        if src.shape != (self.n, self.k) or src.dtype != self.dtype:
            raise ConfigError(
                f"cannot repack {words(src)} into a packed [{self.n}, {self.k}] {self.dtype}; "
                "pack a new matrix for another shape or dtype"
            )
        if self.n == 0 or self.k == 0:
            return
        if src.stride(1) != 1 and src.stride(0) != 1:
            src = src.contiguous()
        status = _packer()(
            dtype, src.data_ptr(), src.stride(0), _k_stride(src), self.n, self.leaves, len(self.starts), self.units,
            self.address,
        )  # fmt: skip
        succeeded("pack", status)

    def follow(self, matrix: Callable[[], Tensor], memory: Tensor | None = None) -> None:
        """repack() of matrix(); from now on every product looks at a few of its elements and takes all over again where
        they differ, for writes that no counter shows. Whoever replaces that memory calls this again before a product.
        `memory`: the first columns of the matrix, where it is itself no memory that lasts.
        """
        src = matrix().detach()
        self.repack(src)
        seen = src if memory is None else memory.detach()
        if self.n == 0 or seen.shape[1] == 0:
            return
        _WATCH.pack_into(
            self._watch, 0, seen.data_ptr(), *seen.stride(), self.n, seen.shape[1], seen.element_size(), self.address,
            self.units, ctypes.addressof(self.leaves), len(self.starts), 0,
        )  # fmt: skip
        self._matrix, self.watch = matrix, ctypes.addressof(self._watch)

    def unpack(self) -> Tensor:
        """The matrix [N, K] that was packed, the same bits; a new contiguous tensor."""
        matrix = torch.empty(self.n, self.k, dtype=self.dtype)
        if matrix.numel():
            status = _unpacker()(
                self.number, self.address, self.n, self.k, self.leaves, len(self.starts), self.units, matrix.data_ptr()
            )
            succeeded("unpack", status)
        return matrix

    def catch_up(self) -> None:
        """Takes over what the watched matrix holds now."""
        if self._matrix is not None:
            self.repack(self._matrix())


def block_of(dtype: torch.dtype) -> int:
    """Elements of K that no leaf shares with another."""
    return BLOCK if dtype is torch.bfloat16 else 1


def units_of(elements: int, dtype: torch.dtype) -> int:
    """Units of a leaf of so many elements."""
    block = block_of(dtype)
    return -(-(-(-elements // block) * block * dtype.itemsize) // UNIT)


def leaves_of(weight: Panels) -> ctypes.Array:
    flat = [
        v for pair, start in zip(itertools.pairwise(weight.borders), weight.starts, strict=True) for v in (*pair, start)
    ]
    return (ctypes.c_int64 * len(flat))(*flat)


@cache
def _packer() -> Callable[..., int]:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    return entry("gemm_pack", (ctypes.c_int, pointer, size, size, size, pointer, size, size, pointer), ctypes.c_int)


@cache
def _unpacker() -> Callable[..., int]:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    return entry("gemm_unpack", (ctypes.c_int, pointer, size, size, pointer, size, size, pointer), ctypes.c_int)


def _k_stride(src: Tensor) -> int:
    return 1 if src.shape[1] == 1 else src.stride(1)
