"""Layer norm against torch's, and its gradients with tokens divided over ranks or not: one set of bits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from parallel.layers.dropout import LayerPass
from parallel.layers.norm import LayerNorm, RMSNorm
from parallel.matmul import products
from parallel.ranks.group import Group
from parallel.ranks.sequence_parallel import gather_tokens, scatter_tokens, token_shards

EPS = 1e-5


def _run(group: Group, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, divided: bool) -> dict[str, Any]:
    group = replace(group, sequence_parallel=divided)
    layer = LayerNorm(x.shape[1], EPS, group=group, dtype=x.dtype)
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()  # type: ignore[union-attr]
    x = x.clone().requires_grad_()
    tokens = token_shards(x.shape[0], group)
    y = gather_tokens(layer(scatter_tokens(x, group, tokens), LayerPass(tokens=tokens)), group, tokens)
    y.backward(grad)
    return {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad}  # type: ignore[union-attr]


@pytest.mark.parametrize("num_tokens", [1, 5, 70])
def test_layer_norm_equals_torch_and_keeps_its_bits_when_tokens_are_divided(ranks: Any, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    x, grad = (torch.randn(num_tokens, 25, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(25, generator=generator) for _ in range(2))
    single = _run(Group.single(), x, weight, bias, grad, False)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    functional.layer_norm(leaves[0], (25,), leaves[1], leaves[2], EPS).backward(grad)
    for name, leaf in zip(("dx", "dw", "db"), leaves, strict=True):
        torch.testing.assert_close(single[name], leaf.grad, rtol=1e-5, atol=1e-5)
    for size in (2, 3, 4):
        for divided in (False, True):
            for result in ranks(size, _run, x, weight, bias, grad, divided):
                for name, value in single.items():
                    assert torch.equal(result[name], value), f"{name} at {size} ranks, tokens divided: {divided}"


def _rms(group: Group, x: Tensor, weight: Tensor, grad: Tensor, divided: bool) -> dict[str, Any]:
    group = replace(group, sequence_parallel=divided)
    layer = RMSNorm(x.shape[1], EPS, group=group)
    layer.weight.data = weight.clone()
    x = x.clone().requires_grad_()
    tokens = token_shards(x.shape[0], group)
    y = gather_tokens(layer(scatter_tokens(x, group, tokens), LayerPass(tokens=tokens)), group, tokens)
    y.backward(grad)
    with torch.no_grad():
        assert torch.equal(layer(x), y), "with and without gradients"
    return {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad}


@pytest.mark.parametrize("native", [True, False])
def test_rms_norm_equals_torch_and_keeps_its_bits_when_tokens_are_divided(
    ranks: Any, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(13, 25, generator=generator) + 0.5 for _ in range(2))
    weight = torch.randn(25, generator=generator)
    if not native:
        monkeypatch.setattr(products, "native_products", lambda: False)
    single = _rms(Group.single(), x, weight, grad, False)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    y = functional.rms_norm(leaves[0], (25,), leaves[1], EPS)
    y.backward(grad)
    torch.testing.assert_close(single["y"], y.detach(), rtol=1e-5, atol=1e-6)
    for name, leaf in zip(("dx", "dw"), leaves, strict=True):
        torch.testing.assert_close(single[name], leaf.grad, rtol=1e-5, atol=1e-5)
    for size, divided in ((2, False), (3, True)) if native else ():
        for result in ranks(size, _rms, x, weight, grad, divided):
            for name, value in single.items():
                assert torch.equal(result[name], value), f"{name} at {size} ranks, tokens divided: {divided}"
