"""Gradients of layer norm and of a softmax: close to float64, the same bits wherever a row or leaf stands."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from parallel.errors import ConfigError
from parallel.native import elementwise as ew
from parallel.native.compiled import library

pytestmark = pytest.mark.skipif(not library.available(), reason="the native kernels cannot be built here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 25, 64, 200])
def test_layer_norm_gradients_are_accurate_leaf_by_leaf(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, dy, weight = (torch.randn(*shape).to(dtype) for shape in ((37, width), (37, width), (width,)))
    borders = (0, 5, 5, 20, 37)
    dx, sums = ew.layer_norm_grad(x, dy, weight, 1e-5, borders)
    for leaf, (lo, hi) in enumerate(itertools.pairwise(borders)):
        wide = [t.double().requires_grad_() for t in (x[lo:hi], weight, torch.zeros(width))]
        y = F.layer_norm(wide[0], (width,), wide[1], wide[2], 1e-5)
        wanted = torch.autograd.grad(y, wide, dy[lo:hi].double())
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(dx[lo:hi].double(), wanted[0], atol=10 * tolerance, rtol=tolerance)
        torch.testing.assert_close(sums[leaf].double(), torch.stack(wanted[1:]), atol=2e-4, rtol=1e-4)
    library.set_threads(2)
    again = ew.layer_norm_grad(x, dy, weight, 1e-5, borders)
    library.set_threads(1)
    assert torch.equal(again[0], dx) and torch.equal(again[1], sums)
    part = ew.layer_norm_grad(x[5:20], dy[5:20], weight, 1e-5, (0, 15))
    assert torch.equal(part[0], dx[5:20]) and torch.equal(part[1][0], sums[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 25, 200])
def test_an_rms_norm_and_its_gradients_are_accurate_leaf_by_leaf(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, dy, weight = ((torch.randn(*shape) + 1).to(dtype) for shape in ((37, width), (37, width), (width,)))
    borders = (0, 5, 5, 20, 37)
    y = ew.rms_norm(x, weight, 1e-5)
    dx, sums = ew.layer_norm_grad(x, dy, weight, 1e-5, borders, centred=False)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for leaf, (lo, hi) in enumerate(itertools.pairwise(borders)):
        wide = [t.double().requires_grad_() for t in (x[lo:hi], weight)]
        rows = F.rms_norm(wide[0], (width,), wide[1], 1e-5)
        wanted = torch.autograd.grad(rows, wide, dy[lo:hi].double())
        torch.testing.assert_close(y[lo:hi].double(), rows.detach(), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(dx[lo:hi].double(), wanted[0], atol=10 * tolerance, rtol=tolerance)
        torch.testing.assert_close(sums[leaf, 0].double(), wanted[1], atol=2e-4, rtol=1e-4)
    assert torch.equal(ew.rms_norm(x[5:7], weight, 1e-5), y[5:7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["silu", "gelu", "relu"])
def test_a_gate_and_its_gradients_are_accurate_and_an_elements_own(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up, dy = (torch.randn(7, 33).to(dtype) for _ in range(3))
    wide = [t.double().requires_grad_() for t in (gate, up)]
    wanted = getattr(F, name)(wide[0]) * wide[1]
    tolerance = 2e-6 if dtype is torch.float32 else 1e-2
    out, grads = ew.gate(gate, up, name), ew.gate_grad(gate, up, dy, name)
    torch.testing.assert_close(out.double(), wanted.detach(), atol=tolerance, rtol=tolerance)
    for got, exact in zip(grads, torch.autograd.grad(wanted, wide, dy.double()), strict=True):
        torch.testing.assert_close(got.double(), exact, atol=tolerance, rtol=tolerance)
    assert torch.equal(ew.gate(gate[2:3], up[2:3], name), out[2:3])
    for got, part in zip(grads, ew.gate_grad(gate[2:3], up[2:3], dy[2:3], name), strict=True):
        assert torch.equal(part, got[2:3])


@pytest.mark.parametrize("columns", [1, 33, 500])
def test_softmax_gradients_are_softmax_minus_one_hot(columns: int) -> None:
    torch.manual_seed(0)
    logits, scales = torch.randn(9, columns) * 4, torch.rand(9)
    targets = torch.randint(-1, columns, (9,))
    top = ew.row_max(logits)
    total = ew.exp_sum(logits, top, (0, columns))[:, 0].contiguous()
    found = ew.softmax_grad(logits, top, total, targets, scales)
    one_hot = torch.zeros(9, columns, dtype=torch.float64)
    for row, target in enumerate(targets.tolist()):
        if target >= 0:
            one_hot[row, target] = 1.0
    wanted = (logits.double().softmax(1) - one_hot) * scales.double()[:, None]
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
    alone = ew.softmax_grad(logits[3:4], top[3:4], total[3:4], targets[3:4], scales[3:4])
    assert torch.equal(alone[0], found[3])


def test_wrong_shapes_are_refused() -> None:
    x = torch.ones(4, 8)
    with pytest.raises(ConfigError, match="layer_norm_grad: dy is .* its shape must be"):
        ew.layer_norm_grad(x, torch.ones(4, 7), None, 1e-5, (0, 4))
    with pytest.raises(ConfigError, match=r"borders \(0, 3\) must ascend from 0 to the 4 rows"):
        ew.layer_norm_grad(x, x, None, 1e-5, (0, 3))
    with pytest.raises(ConfigError, match="softmax_grad: top is .* its shape must be"):
        ew.softmax_grad(x, torch.ones(3), torch.ones(4), torch.zeros(4, dtype=torch.long), torch.ones(4))
