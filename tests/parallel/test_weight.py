"""A packed weight follows every write to its parameter, however it is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from parallel import products
from parallel.group import Group
from parallel.linear import ColumnLinear
from parallel.products import Operand, Term, product
from parallel.weight import Weight, stamp


def rewritten(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 2


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "zero": lambda p: p.data.zero_(),
    "one element": lambda p: p.data.view(-1)[5:6].fill_(9.0),
    "a row": lambda p: p.data[3].mul_(2),
    "replaced": rewritten,
    "detached": lambda p: p.detach().add_(1.0),
    "no_grad": lambda p: nn.init.zeros_(p),
}
PAST_PYTORCH: dict[str, Callable[[nn.Parameter], object]] = {
    "numpy": lambda p: p.detach().numpy().fill(0.5),
    "data of a plain parameter": lambda p: p.data.zero_(),
}


def layer() -> ColumnLinear:
    group = Group.single()
    made = ColumnLinear(48, group.shards(40), group=group)
    nn.init.normal_(made.weight)
    nn.init.zeros_(made.bias)  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_every_write_through_pytorch_is_seen_by_the_next_product(
    write: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(products, "native_products", lambda: False)
    column, x = layer(), torch.randn(3, 48)
    alias = column.weight.data  # taken before the product, written to after it
    with torch.no_grad():
        column(x)
        WRITES[write](column.weight)
        torch.testing.assert_close(column(x), x @ column.weight.t(), atol=1e-4, rtol=1e-4)
        if write != "replaced":
            alias.mul_(3)
            torch.testing.assert_close(column(x), x @ column.weight.t(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("write", PAST_PYTORCH)
def test_a_write_to_a_whole_matrix_past_pytorch_is_seen_too(
    write: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(products, "native_products", lambda: False)
    parameter, x = nn.Parameter(torch.randn(40, 48)), torch.randn(3, 48)
    operand = Operand(parameter, (0, 24, 48))
    with torch.no_grad():
        product([Term(x, operand)])
        PAST_PYTORCH[write](parameter)
        torch.testing.assert_close(product([Term(x, operand)]), x @ parameter.t(), atol=1e-4, rtol=1e-4)


def test_a_parameter_put_in_the_place_of_another_is_used() -> None:
    column, x = layer(), torch.randn(3, 48)
    with torch.no_grad():
        column(x)
        column.weight = nn.Parameter(torch.ones(40, 48))
        torch.testing.assert_close(column(x), x @ torch.ones(48, 40), atol=1e-4, rtol=1e-4)


def test_a_bias_that_is_trained_beside_a_frozen_weight_gets_its_gradient() -> None:
    column = layer()
    column.weight.requires_grad_(False)
    column(torch.randn(3, 48)).sum().backward()
    assert column.bias is not None and column.bias.grad is not None
    assert torch.equal(column.bias.grad, torch.full((40,), 3.0))


def test_a_stamp_changes_with_a_write_and_with_nothing_else() -> None:
    weight = Weight(torch.zeros(4))
    before = stamp(weight)
    assert weight.data.sum() == 0 and stamp(weight) == before
    weight.data[0] = 1
    assert stamp(weight) != before
    with torch.inference_mode():
        made: Tensor = torch.zeros(4)
    assert stamp(made)[0] == 0
