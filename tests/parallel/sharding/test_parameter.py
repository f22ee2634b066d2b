"""A packed weight follows every write to its parameter, however it is made."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from parallel.errors import ConfigError
from parallel.layers.dropout import PLAIN
from parallel.layers.linear import ColumnLinear, RowLinear, reduce_sum
from parallel.layers.low_rank import ColumnAdapter, RowAdapter
from parallel.matmul import products
from parallel.matmul.products import Operand, Term, product
from parallel.ranks.group import Group
from parallel.sharding.parameter import Weight, stamp, written


def rewritten(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 2


def transposed(parameter: nn.Parameter) -> None:
    parameter.data = torch.randn(parameter.shape[::-1]).t()


def there_and_back(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.double()
    parameter.data = parameter.data.float() * 2


def in_inference_mode(parameter: nn.Parameter) -> None:
    with torch.inference_mode():
        parameter[3, 4:5].fill_(50.0)


def of_inference_mode(parameter: nn.Parameter) -> None:
    with torch.inference_mode():
        parameter.data = torch.zeros_like(parameter)
        parameter[3, 4:5].fill_(50.0)


def optimised(parameter: nn.Parameter, **how: bool) -> None:
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=1.0, **how).step()  # type: ignore[arg-type]


def numpy_said(parameter: nn.Parameter) -> None:
    parameter.detach().numpy()[3, 4] = 50.0
    written(parameter)


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "zero": lambda p: p.data.zero_(),
    "a row set": lambda p: p.data.__setitem__(0, 1.0),
    "an element set": lambda p: p.data.__setitem__((2, 3), 90.0),
    "foreach": lambda p: torch._foreach_add_([p], 1.0),
    "foreach over data": lambda p: torch._foreach_mul_([p.data, p.detach()], 2.0),
    "optimiser's foreach": lambda p: optimised(p, foreach=True),
    "optimiser's fused": lambda p: optimised(p, fused=True),
    "numpy, said": numpy_said,
    "one element": lambda p: p.data.view(-1)[5:6].fill_(9.0),
    "a row": lambda p: p.data[3].mul_(2),
    "replaced": rewritten,
    "detached": lambda p: p.detach().add_(1.0),
    "no_grad": lambda p: nn.init.zeros_(p),
    "copied into": lambda p: p.copy_(torch.ones_like(p)),
    "other memory": lambda p: p.set_(torch.ones_like(p).detach()),  # type: ignore[call-overload]
    "strided memory": transposed,
    "in inference mode": in_inference_mode,
    "memory of inference mode": of_inference_mode,
    "another type and back": there_and_back,
    "swapped": lambda p: torch.utils.swap_tensors(p, nn.Parameter(torch.ones_like(p))),
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
        if alias.data_ptr() == column.weight.data_ptr():  # no other memory took its place
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


def test_a_plain_parameter_put_in_the_place_of_another_is_used_and_its_writes_are_seen() -> None:
    column, x = layer(), torch.randn(3, 48)
    with torch.no_grad():
        column(x)
        column.weight = nn.Parameter(torch.ones(40, 48))
        torch.testing.assert_close(column(x), x @ torch.ones(48, 40), atol=1e-4, rtol=1e-4)
        column.weight.data[3, 4] = 50.0  # one element, which PyTorch does not count
        torch.testing.assert_close(column(x), x @ column.weight.t(), atol=1e-4, rtol=1e-4)


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
    assert stamp(made) != stamp(made), "nothing is counted there, so it may have been written to"


def test_a_copied_and_a_saved_layer_pack_their_own_weights() -> None:
    column, x = layer(), torch.randn(3, 48)
    with torch.no_grad():
        want = column(x)
        column.weight.data.mul_(1.0)
        file = io.BytesIO()
        torch.save(column, file)
        file.seek(0)
        for other in (copy.deepcopy(column), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), want)
            other.weight.data.zero_()
            assert other(x).abs().max() == 0
            assert torch.equal(column(x), want)
            del other
            gc.collect()
            assert torch.equal(column(x), want)
    with pytest.raises(ConfigError, match="cannot be copied"):
        copy.deepcopy(Operand(column.weight, (0, 48)).packed())


@pytest.mark.parametrize("kind", ["column", "row"])
def test_an_adapters_factors_follow_their_writes_and_their_replacement(kind: str) -> None:
    group, x = Group.single(), torch.randn(3, 48)
    base: ColumnLinear | RowLinear
    if kind == "column":
        base = ColumnLinear(48, group.shards(40), group=group, bias=False)
        base.adapter = ColumnAdapter(base.weight, base.parts, group, 4, 2.0)
    else:
        base = RowLinear(group.shards(48), 40, group=group, bias=False)
        base.adapter = RowAdapter(base.weight, base.shards, group, 4, 2.0)
    nn.init.normal_(base.weight)
    branch = base.adapter
    assert branch is not None

    def check() -> None:
        given, plain = (x.clone().requires_grad_() for _ in range(2))
        want = plain @ base.weight.t() + 2 * (plain @ branch.a.t()) @ branch.b.t()
        torch.testing.assert_close(base(given), want, atol=1e-3, rtol=1e-3)
        with torch.no_grad():
            torch.testing.assert_close(base(x), want, atol=1e-3, rtol=1e-3)
        base(given).sum().backward()
        want.sum().backward()
        torch.testing.assert_close(given.grad, plain.grad, atol=1e-3, rtol=1e-3)

    for parameter in (branch.a, branch.b):
        nn.init.normal_(parameter)
    check()
    branch.a, branch.b = (nn.Parameter(torch.randn_like(p)) for p in (branch.a, branch.b))
    check()
    for parameter in (branch.a, branch.b):
        parameter.data.mul_(2)
    check()
    for parameter in (branch.a, branch.b):
        parameter.detach().numpy().fill(0.5)
    check()


def test_a_bias_put_in_the_place_of_another_is_in_the_sum_that_layers_share() -> None:
    group, x = Group.single(), torch.zeros(1, 48)
    layers = [RowLinear(group.shards(48), 40, group=group) for _ in range(2)]
    with torch.no_grad():
        for value in range(4):
            for row in layers:
                row.bias = nn.Parameter(torch.full((40,), float(value)))
                nn.init.zeros_(row.weight)
            assert torch.equal(reduce_sum(PLAIN, *(row.partial(x) for row in layers)), torch.full((1, 40), 2.0 * value))
