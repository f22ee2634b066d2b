"""The kernels that stand for operations of torch against these, bit for bit."""

from __future__ import annotations

import pytest
import torch

from parallel.errors import OperandError
from parallel.native import step_kernels

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (3, 16), (2, 17), (5, 768), (1, 100_003)]


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_arithmetic_has_torchs_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a, b = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype).flip(0) * 3
    a[0, 0] = float("nan")
    a[-1, -1] = -0.0
    for ours, theirs in (
        (step_kernels.added(a, b), a + b),
        (step_kernels.added_scalar(a, 0.0), a + 0.0),
        (step_kernels.scaled(a, 0.3), a * 0.3),
        (step_kernels.clamped(a, -0.5, 0.25), a.clamp(-0.5, 0.25)),
    ):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.signbit() & ~ours.isnan(), theirs.signbit() & ~theirs.isnan())
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_of_any_strides_have_torchs_bits(dtype: torch.dtype, to: torch.dtype) -> None:
    x = numbers(3, 4, 5, 33, dtype=dtype)
    for view in (x, x.transpose(1, 3), x.permute(3, 2, 1, 0), x[1], x[:, 1:3, ::2], x[0, 0, 0], x.expand(3, 4, 5, 33)):
        copy = step_kernels.copied(view, to)
        assert copy.is_contiguous() and torch.equal(copy, view.to(to))


@pytest.mark.parametrize(
    "table", [numbers(7, 33, dtype=torch.bfloat16), torch.arange(9), numbers(4, 3, 5, dtype=torch.float32)]
)
def test_rows_are_those_of_the_table(table: torch.Tensor) -> None:
    index = torch.tensor([0, len(table) - 1, 2, 2])
    assert torch.equal(step_kernels.rows_of(table, index), table[index])
    for outside in (-1, len(table)):
        with pytest.raises(OperandError, match="an index"):
            step_kernels.rows_of(table, torch.tensor([0, outside]))


def test_operands_that_do_not_fit_are_refused() -> None:
    x = numbers(2, 8, dtype=torch.float32)
    with pytest.raises(OperandError, match="shape"):
        step_kernels.added(x, x[:1])
    with pytest.raises(OperandError, match="dimensions"):
        step_kernels.copied(x.view(1, 1, 1, 2, 8), torch.float32)
    with pytest.raises(OperandError, match="dimensions"):
        step_kernels.copied(x, torch.float64)
    with pytest.raises(OperandError, match="contiguous"):
        step_kernels.rows_of(x.t(), torch.tensor([0]))
