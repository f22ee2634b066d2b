"""Functions of IEEE operations against Python's numbers of forty digits and torch's float64."""

from __future__ import annotations

import math
from decimal import Context, Decimal

import pytest
import torch
from torch.nn import functional

from parallel import exact

DIGITS = Context(prec=40)


def spread(low: float, high: float, count: int = 200_001) -> torch.Tensor:
    return torch.linspace(low, high, count, dtype=torch.float64)


@pytest.mark.parametrize("farthest", [1.0, 100.0, 2.0**22])
def test_cosine_and_sine_are_within_an_ulp_of_one(farthest: float) -> None:
    angles = spread(-farthest, farthest)
    cosine, sine = exact.cos_sin(angles)
    assert float((cosine - angles.cos()).abs().max()) < 4e-16
    assert float((sine - angles.sin()).abs().max()) < 4e-16


def test_angles_next_to_quarter_turns_keep_their_digits() -> None:
    angles = (torch.arange(1, 2_000_000, 997, dtype=torch.float64) * (math.pi / 2)).float().double()
    cosine, sine = exact.cos_sin(angles)
    for found, true in ((cosine, angles.cos()), (sine, angles.sin())):
        assert float(((found - true) / true).abs().max()) < 1e-9
        assert bool((found.float() == true.float()).float().mean() > 0.999)


def test_exponentials_logarithms_and_powers_of_tables() -> None:
    x = spread(-700.0, 700.0)
    assert float((exact.exps(x) / x.exp() - 1).abs().max()) < 5e-16
    positive = spread(-300.0, 300.0).exp()
    assert float((exact.logs(positive) / positive.log() - 1).abs().max()) < 5e-16
    bases, powers = torch.tensor([10000.0, 500000.0, 2.0])[:, None], torch.arange(0, 128, 2) / 128
    found = exact.powers(bases, powers)
    true = [[math.pow(base, power) for power in powers.tolist()] for base in bases[:, 0].tolist()]
    assert float((found / torch.tensor(true, dtype=torch.float64) - 1).abs().max()) < 1e-14


def test_exponentials_at_the_ends() -> None:
    given = torch.tensor([math.inf, -math.inf, math.nan, 1000.0, -1000.0, 0.0])
    assert exact.exps(given).tolist()[:2] == [math.inf, 0.0]
    assert math.isnan(exact.exps(given)[2])
    assert exact.exps(given).tolist()[3:] == [math.inf, 0.0, 1.0]


@pytest.mark.parametrize("x", [1e-9, 0.3, 1.0, 2.0, 32768.0 / 200.0])
def test_scalars_are_rounded_to_nearest(x: float) -> None:
    assert exact.log(x) == float(DIGITS.ln(Decimal(x)))
    assert exact.power(x, 0.0) == 1.0
    assert exact.power(x, 1.0) == x
    assert exact.power(x, -0.7) == pytest.approx(x**-0.7, rel=1e-15)
    assert exact.whole_power(x, 13) == pytest.approx(x**13, rel=1e-14)
    assert exact.whole_power(x, 0) == 1.0


@pytest.mark.parametrize("function", ["exp", "log_sigmoid"])
def test_what_losses_use_has_the_values_and_gradients_of_torch(function: str) -> None:
    theirs = {"exp": torch.exp, "log_sigmoid": functional.logsigmoid}[function]
    x = spread(-40.0, 40.0, 2001).requires_grad_()
    ours, true = getattr(exact, function)(x), theirs(x)
    torch.testing.assert_close(ours, true, rtol=2e-15, atol=0.0)
    for found, expected in zip(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(true.sum(), x), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-15, atol=0.0)


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 1001])
def test_a_sum_folds_its_second_half_onto_its_first(size: int) -> None:
    x = torch.arange(2 * size, dtype=torch.float64).view(size, 2).requires_grad_()
    assert torch.equal(exact.ordered_sum(x, 0), x.sum(0))
    assert torch.equal(exact.ordered_sum(x.t(), 1), x.sum(0))
    if size:
        exact.ordered_sum(x, 0)[0].backward()
        assert x.grad is not None
        assert x.grad.sum(0).tolist() == [size, 0.0]
    terms = torch.tensor([1.0, 2.0**-24, -1.0, 2.0**-24])  # (1 - 1) + (2^-24 + 2^-24)
    assert float(exact.ordered_sum(terms)) == 2.0**-23
