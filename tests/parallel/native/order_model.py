"""bfloat16 products in the order `amx32`, element by element in NumPy, and what any build of the kernels must equal."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

BLOCK = 32
LEAST = np.float32(2.0**-126)
F32 = torch.float32


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < LEAST, np.copysign(np.float32(0), x), x)


def chain(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """fma over K from +0; float64 holds a product of bfloat16 exactly, and its sums round to float32 as fma does."""
    total = np.zeros((x.shape[0], w.shape[0]), np.float32)
    for k in range(x.shape[1]):
        exact = x[:, k, None].astype(np.float64) * w[None, :, k].astype(np.float64)
        total = flushed((exact + total.astype(np.float64)).astype(np.float32))
    return total


def leaf(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    total = np.zeros((x.shape[0], w.shape[0]), np.float32)
    x, w = (np.pad(flushed(t), ((0, 0), (0, -t.shape[1] % BLOCK))) for t in (x, w))
    for at in range(0, x.shape[1], BLOCK):
        even, odd = (chain(x[:, at + i : at + BLOCK : 2], w[:, at + i : at + BLOCK : 2]) for i in (0, 1))
        total = flushed(total + flushed(even + odd))
    return total


def node(leaves: list[np.ndarray]) -> np.ndarray:
    if len(leaves) == 1:
        return leaves[0]
    middle = (len(leaves) + 1) // 2
    return node(leaves[:middle]) + node(leaves[middle:])


def halves(borders: tuple[int, ...]) -> list[tuple[int, int]]:
    """The leaves of the whole tree, and of the two under its root."""
    leaves = len(borders) - 1
    middle = (leaves + 1) // 2
    return [(0, leaves), *([(0, middle), (middle, leaves)] if leaves > 1 else [])]


def model(x: Tensor, w: Tensor, borders: tuple[int, ...]) -> Tensor:
    """[1 or 3, M, N]: the roots of `halves`."""
    a, b = x.float().numpy(), w.float().numpy()
    with np.errstate(all="ignore"):
        leaves = [leaf(a[:, lo:hi], b[:, lo:hi]) for lo, hi in itertools.pairwise(borders)]
        return torch.from_numpy(np.stack([node(leaves[lo:hi]) for lo, hi in halves(borders)]))


def drawn(rows: int, k: int, seed: int, least: int, most: int) -> Tensor:
    """Any signs and mantissas, exponents of `least` to `most` - 1 (0: denormals and zeros, 255: infinities and NaN)."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 1 << 16, (rows, k)) & 0x807F | generator.integers(least, most, (rows, k)) << 7
    return torch.from_numpy(bits.astype(np.int16)).view(torch.bfloat16)


def cases() -> list[tuple[Tensor, Tensor, tuple[int, ...]]]:
    ordinary, tiny, odd = (120, 136), (56, 72), (0, 31, 64, 100, 101, 101, 165)
    found = []
    for seed, (m, n, borders, exponents) in enumerate(
        [
            (1, 70, odd, ordinary), (2, 65, (0, 96), ordinary), (7, 130, odd, tiny), (13, 5, (0, 32, 64, 97), (0, 2)),
            (70, 33, (0, 40, 80, 120, 160), ordinary), (3, 64, (0, 64), (0, 256)), (5, 20, (0, 1), (60, 66)),
            (41, 33, (0, 9, 41, 77), (0, 256)), (35, 30, odd, tiny),
        ]
    ):  # fmt: skip
        k = borders[-1]
        other = (127, 128) if exponents == (0, 2) else exponents
        found.append((drawn(m, k, seed, *exponents), drawn(n, k, seed + 100, *other), borders))
    zeros = torch.full((40, 50), -0.0, dtype=torch.bfloat16)
    return [*found, (zeros, drawn(70, 50, 9, *ordinary), (0, 50))]


def same(got: Tensor, want: Tensor) -> bool:
    """Equal bits; of a NaN only that it is one."""
    number = ~want.isnan()
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(
        got[number].view(torch.int32), want[number].view(torch.int32)
    )


def check() -> None:
    """Every case equals the model, at any number of rows, on two threads, by several roots; packed weights unpack."""
    from parallel.native.compiled import library
    from parallel.native.gemm import Source, nodes, product
    from parallel.native.packed_weight import PackedMatrix

    for number, (x, w, borders) in enumerate(cases()):
        packed, (want, *parts) = PackedMatrix.pack(w, borders), model(x, w, borders)
        assert torch.equal(packed.unpack().view(torch.int16), w.view(torch.int16)), number
        for threads in (1, 2):
            library.set_threads(threads)
            for rows in range(1, x.shape[0] + 1):
                got = product([Source(x[:rows], packed, borders)], out_dtype=F32)
                assert same(got, want[:rows]), (number, threads, rows)
        assert same(product([Source(x.t().contiguous().t(), packed, borders)], out_dtype=F32), want), number
        for part, got in zip(parts, nodes([Source(x, packed, borders)], halves(borders)[1:]), strict=True):
            assert same(got, part), number
    x, w = torch.randn(50, 301), torch.randn(70, 301)
    packed = PackedMatrix.pack(w)
    assert torch.equal(packed.unpack(), w)
    full = product([Source(x, packed, (0, 100, 201, 301))])
    assert ((full - x @ w.t()).norm() / full.norm()).item() < 2e-6
    for rows in (1, 2, 7, 31):
        assert torch.equal(product([Source(x[9 : 9 + rows], packed, (0, 100, 201, 301))]), full[9 : 9 + rows])
