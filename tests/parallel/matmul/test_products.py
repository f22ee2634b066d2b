"""Products where there is no compiler: oneDNN through torch, right, and the same bits whatever stands around a row."""

import pytest
import torch

from parallel.matmul import onednn, products
from parallel.matmul.products import Operand, Term, nodes, product

pytestmark = pytest.mark.skipif(not onednn.available(), reason="this torch has no packed oneDNN operators")


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "native_products", lambda: False)


def _case(n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + k)
    return (torch.randn(rows, k, generator=generator).to(dtype) for rows in (70, n))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(3, 5), (5, 2300), (64, 1024), (100, 1700), (256, 4096), (768, 768)])
def test_the_fallback_is_right_and_a_rows_bits_are_its_own(n: int, k: int, dtype: torch.dtype) -> None:
    x, weight = _case(n, k, dtype)
    borders = (0, k // 3, k // 2, k)
    operand = Operand(weight, borders)
    whole = product([Term(x, operand)], dtype=torch.float32)
    wanted = x.double() @ weight.double().t()
    assert float((whole - wanted).norm() / wanted.norm()) < (1e-6 if dtype is torch.float32 else 5e-3)
    for rows in (1, 2, 3, 17, 32, 34):
        for first in (0, 11, 36):
            part = product([Term(x[first : first + rows], operand)], dtype=torch.float32)
            assert torch.equal(part, whole[first : first + rows]), f"{rows} rows from {first}"


def test_subtrees_add_up_to_the_whole_product() -> None:
    x, weight = _case(32, 96, torch.float32)
    borders = (0, 24, 48, 72, 96)
    left, right = nodes([Term(x, Operand(weight, borders))], [(0, 2), (2, 4)])
    assert torch.equal(left + right, product([Term(x, Operand(weight, borders))]))


def test_the_packed_leaves_follow_the_weight() -> None:
    x, weight = _case(16, 32, torch.float32)
    operand = Operand(weight, (0, 32))
    before = product([Term(x, operand)])
    weight.mul_(2.0)
    assert torch.equal(product([Term(x, operand)]), before * 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 15, 16])
def test_strided_expanded_and_empty_rows_give_what_contiguous_ones_do(n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide, weight = torch.randn(9, 80).to(dtype), torch.randn(n, 40).to(dtype)
    turned = wide[:, :40].t().contiguous().t()
    for x in (wide[:, ::2], wide[::4, :40], turned, wide[:1, :40].expand(5, -1), wide[:0, :40]):
        for matrix in (weight, weight.t().contiguous().t(), weight.repeat_interleave(2, 1)[:, ::2]):
            operand = Operand(matrix, (0, 13, 40))
            found = product([Term(x, operand)], dtype=torch.float32)
            assert torch.equal(
                found, product([Term(x.contiguous(), Operand(weight, (0, 13, 40)))], dtype=torch.float32)
            )
            wanted = x.double() @ weight.double().t()
            assert torch.allclose(found.double(), wanted, atol=1e-5 if dtype is torch.float32 else 0.2)
