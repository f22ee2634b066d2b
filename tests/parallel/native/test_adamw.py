"""The native AdamW update: torch's numbers, the same bits wherever an element stands, the rounded copy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from parallel.errors import ConfigError
from parallel.native.adamw import Rates, update
from parallel.native.compiled import library

pytestmark = pytest.mark.skipif(not library.available(), reason="the native kernels cannot be built here")
N = 1003


def rates(step: int, **given: float) -> Rates:
    usual = {"learning_rate": 3e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
    return Rates(step=step, **{**usual, **given})


def state(n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n), torch.zeros(n), torch.zeros(n)


def test_ten_steps_are_those_of_torch() -> None:
    master, first, second = state()
    parameter = nn.Parameter(master.clone())
    torchs = torch.optim.AdamW([parameter], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 11):
        grad = torch.randn(N) * 10.0 ** torch.randint(-6, 2, (N,))
        update(master, grad, first, second, rates(step, scale=0.25))
        parameter.grad = grad * 0.25
        torchs.step()
    torch.testing.assert_close(master, parameter.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(second, torchs.state[parameter]["exp_avg_sq"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_element_has_the_same_bits_wherever_it_stands(threads: int) -> None:
    n = 100_003
    master, first, second = state(n)
    grad = torch.randn(n)
    part = slice(7, 7 + N)
    alone = master[part].clone(), grad[part].clone(), first[part].clone(), second[part].clone()
    library.set_threads(threads)
    try:
        update(master, grad, first, second, rates(1))
        update(alone[0], alone[1], alone[2], alone[3], rates(1))
    finally:
        library.set_threads(1)
    for whole, own in zip((master, first, second), (alone[0], alone[2], alone[3]), strict=True):
        assert torch.equal(whole[part], own)


def test_the_copy_is_the_new_master_rounded() -> None:
    master, first, second = state()
    copy = torch.zeros(N, dtype=torch.bfloat16)
    update(master, torch.randn(N), first, second, rates(1), copy)
    assert torch.equal(copy, master.bfloat16())


def test_what_does_not_fit_is_refused_by_name() -> None:
    master, first, second = state()
    with pytest.raises(ConfigError, match=r"grad is a \[5\] torch.float32 tensor"):
        update(master, torch.zeros(5), first, second, rates(1))
    with pytest.raises(ConfigError, match=r"copy is .* takes strided bfloat16 on the CPU"):
        update(master, torch.zeros(N), first, second, rates(1), torch.zeros(N))
