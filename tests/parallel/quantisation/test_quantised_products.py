"""Products with weights in whole numbers: the bits that their definition gives, at every batch and on every thread."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.native.compiled import library
from parallel.native.gemm import Source, product
from parallel.native.packed_weight import PackedMatrix
from parallel.quantisation.numbers import Numbers
from parallel.quantisation.quantised_weight import QuantisedMatrix
from parallel.quantisation.schemes import quantised
from tests.native_kernels import kernels_or_skip

F32, BF16 = torch.float32, torch.bfloat16
ROWS = (1, 2, 3, 4, 5, 6, 7, 16, 17, 31, 33, 70)
SIZES = [
    (64, 64, (0, 64)),
    (70, 33, (0, 33)),
    (130, 257, (0, 31, 64, 100, 101, 257)),
    (1, 1, (0, 1)),
    (65, 2049, (0, 1025, 2049)),
]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    kernels_or_skip()
    torch.manual_seed(0)
    library.set_threads(2)
    yield
    library.set_threads(1)


def by_column(n: int, k: int) -> Numbers:
    return quantised("int8", torch.randn(n, k) * torch.rand(n, 1).exp())


def by_group(n: int, k: int, bits: int, size: int = 24) -> Numbers:
    """Groups that end where no leaf does, in no order."""
    groups = math.ceil(k / size)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    return Numbers(
        bits,
        torch.randint(low, high, (n, k)).to(torch.int8),
        torch.rand(groups, n) / 8,
        torch.randint(low, high, (groups, n)).to(torch.int8),
        torch.randint(groups, (k,)).int(),
    )


def tree(leaves: list[Tensor]) -> Tensor:
    if len(leaves) == 1:
        return leaves[0]
    mid = (len(leaves) + 1) // 2
    return tree(leaves[:mid]) + tree(leaves[mid:])


def scaled_sums(x: Tensor, made: Numbers, borders: tuple[int, ...]) -> Tensor:
    """By definition: each leaf summed over the whole numbers, as bfloat16, then times the column's scale."""
    leaves = []
    for begin, end in itertools.pairwise(borders):
        packed = PackedMatrix.pack(made.numbers[:, begin:end].to(BF16))
        leaves.append(product([Source(x[:, begin:end], packed, (0, end - begin))], out_dtype=F32) * made.scales[0])
    return tree(leaves)


@pytest.mark.parametrize(("n", "k", "borders"), SIZES)
def test_sums_over_whole_numbers_are_scaled_by_their_column(n: int, k: int, borders: tuple[int, ...]) -> None:
    made, x = by_column(n, k), torch.randn(max(ROWS), k).to(BF16)
    matrix, want = QuantisedMatrix(made, borders), scaled_sums(x, made, borders)
    exact = x.double() @ (made.numbers.double() * made.scales[0, :, None].double()).t()
    assert ((want - exact).norm() / exact.norm()).item() < 1e-5
    for rows in ROWS:
        for threads in (1, 2):
            library.set_threads(threads)
            assert torch.equal(product([Source(x[:rows], matrix, borders)], out_dtype=F32), want[:rows]), rows
    strange = x.t().contiguous().t()
    assert torch.equal(product([Source(strange, matrix, borders)], out_dtype=F32), want)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "borders"), SIZES)
def test_grouped_numbers_have_the_bits_of_the_bfloat16_matrix_they_stand_for(
    n: int, k: int, borders: tuple[int, ...], bits: int
) -> None:
    made, x = by_group(n, k, bits), torch.randn(max(ROWS), k).to(BF16)
    matrix, plain = QuantisedMatrix(made, borders), PackedMatrix.pack(made.values(), borders)
    for rows in ROWS:
        got, want = (product([Source(x[:rows], one, borders)], out_dtype=F32) for one in (matrix, plain))
        assert torch.equal(got, want), rows


def test_a_leaf_is_one_sum_through_a_quantised_and_a_plain_source() -> None:
    """As with an adapter's pair beside a weight: what the leaf held is added after the scale."""
    borders, k = (0, 100, 257), 257
    made, x = by_column(70, k), torch.randn(9, k).to(BF16)
    small, weight = torch.randn(9, 8).to(BF16), torch.randn(70, 8).to(BF16)
    matrix, plain, lines = QuantisedMatrix(made, borders), PackedMatrix.pack(weight, (0, 3, 8)), (0, 3, 8)
    first = product([Source(small, plain, lines), Source(x, matrix, borders)], out_dtype=F32)
    second = product([Source(x, matrix, borders), Source(small, plain, lines)], out_dtype=F32)
    want = x.double() @ made.values().double().t() + small.double() @ weight.double().t()
    for got in (first, second):
        assert ((got - want).norm() / want.norm()).item() < 4e-3
        alone = product([Source(small[4:5], plain, lines), Source(x[4:5], matrix, borders)], out_dtype=F32)
        assert torch.equal(alone, first[4:5])


@pytest.mark.parametrize("made", [by_column(130, 257), by_group(130, 257, 4), by_group(130, 257, 8)])
def test_what_was_packed_comes_back(made: Numbers) -> None:
    matrix = QuantisedMatrix(made, (0, 31, 64, 257))
    found, ids = matrix.numbers(), torch.tensor([129, 0, 64, 63, 0])
    assert torch.equal(found.numbers, made.numbers) and torch.equal(found.scales, made.scales)
    for one, other in ((found.zeros, made.zeros), (found.groups, made.groups)):
        assert one is other is None or (one is not None and other is not None and torch.equal(one, other))
    assert torch.equal(matrix.values(), made.values()) and torch.equal(matrix.rows(ids), made.values()[ids])
    with pytest.raises(IndexError, match="rows -1 to 130 of a matrix of 130"):
        matrix.rows(torch.tensor([130, -1]))
    assert matrix.nbytes < {8: 0.65, 4: 0.5}[made.bits] * PackedMatrix.pack(made.values()).nbytes + 8 * 257 * 2


def test_numbers_are_the_nearest_and_a_part_of_them_is_a_part_of_the_whole() -> None:
    weight = torch.randn(20, 300)
    weight[3] = 0
    for scheme, bound in (("int8", 0.5), ("int4", 0.5)):
        made = quantised(scheme, weight)  # type: ignore[arg-type]
        zeros = 0 if made.zeros is None or made.groups is None else made.zeros[made.groups.long()].t()
        groups = torch.zeros(300).long() if made.groups is None else made.groups.long()
        scales = made.scales[groups].t()
        error = (weight - (made.numbers - zeros) * scales).abs()
        assert bool((error <= (bound + 1e-3) * scales).all()), scheme
        assert not bool(((made.numbers - zeros) * scales)[3].any())
        part = made.part(slice(4, 9), slice(100, 290))
        assert torch.equal(part.values(), made.values()[4:9, 100:290])
        halves = Numbers.joined([made.part(slice(None), slice(0, 77)), made.part(slice(None), slice(77, 300))], 1)
        assert torch.equal(halves.values(), made.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_what_has_no_whole_number_is_refused(scheme: str, value: float) -> None:
    weight = torch.zeros(3, 200)
    weight[1, 150] = value
    with pytest.raises(ConfigError, match="infinite or NaN, for which there is no whole number"):
        quantised(scheme, weight)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give a matrix of weights"):
        quantised(scheme, weight[0])  # type: ignore[arg-type]


def test_numbers_that_do_not_go_together_are_refused() -> None:
    numbers = torch.zeros(4, 6, dtype=torch.int8)
    with pytest.raises(ConfigError, match="a scale per column is for 8 bits"):
        Numbers(4, numbers, torch.ones(1, 4))
    with pytest.raises(ConfigError, match="2 scales per column; without groups it is one"):
        Numbers(8, numbers, torch.ones(2, 4))
    with pytest.raises(ConfigError, match=r"groups are \[5\] torch.int32; they must be \[6\]"):
        Numbers(8, numbers, torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.int8), torch.zeros(5, dtype=torch.int32))
