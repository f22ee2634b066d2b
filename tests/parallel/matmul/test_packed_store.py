"""A weight whose packed form is its only storage: the bytes are gone, the values are not, nothing reads past them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel.errors import ConfigError, WeightReleased
from parallel.layers.linear import ColumnLinear, RowLinear
from parallel.layers.low_rank import ColumnAdapter
from parallel.matmul.products import native_products
from parallel.ranks.group import Group
from parallel.sharding.released_weight import assign, is_released, rows, values
from parallel.vocabulary.vocab_parallel import VocabEmbedding, VocabHead

pytestmark = pytest.mark.skipif(not native_products(), reason="weights are packed for the native kernels")
K = 83
"""Leaves of it are odd."""


def layers(dtype: torch.dtype, n: int) -> list[ColumnLinear | RowLinear]:
    group = Group.single()
    made: list[ColumnLinear | RowLinear] = [
        ColumnLinear(K, group.shards(n), group=group, dtype=dtype),
        RowLinear(group.shards(K), n, group=group, dtype=dtype),
    ]
    for number, layer in enumerate(made):
        generator = torch.Generator().manual_seed(number)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, generator=generator)
            parameter.requires_grad_(False)
        layer.weight.data[0, :4] = torch.tensor([-0.0, torch.inf, 1e-40, torch.nan]).to(dtype)
        layer.weight.data[0, 1] = 3e38
    return made


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 64, 130])
def test_a_released_weight_holds_no_bytes_and_has_every_bit(dtype: torch.dtype, n: int) -> None:
    for layer in layers(dtype, n):
        x, plain = torch.randn(5, K).to(dtype), layer.weight.detach().clone()
        wanted, storage = layer(x), layer.weight.untyped_storage()
        weight = layer.weight
        layer.release()
        assert layer.weight is weight and is_released(weight)
        assert weight.untyped_storage().nbytes() == dtype.itemsize < storage.nbytes()
        assert (weight.shape, weight.dtype, weight.device.type, weight.numel()) == (plain.shape, dtype, "cpu", n * K)
        assert not next(layer.parameters()).requires_grad
        assert torch.equal(bits(values(weight)), bits(plain))
        ids = torch.tensor([n - 1, 0, n // 2, n - 1] * 40)
        assert torch.equal(bits(rows(weight, ids)), bits(plain[ids]))
        assert rows(weight, ids[:0]).shape == (0, K)
        assert torch.equal(bits(layer(x)), bits(wanted))
        layer.release()
        assert torch.equal(bits(values(weight)), bits(plain)), "once more changes nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_values_are_those_of_the_next_product(dtype: torch.dtype) -> None:
    for layer in layers(dtype, 40):
        x, new = torch.randn(3, K).to(dtype), torch.randn(40, K)
        layer.release()
        before = layer(x)
        assign(layer.weight, new)
        assert torch.equal(values(layer.weight), new.to(dtype))
        after = layer(x)
        assert not torch.equal(before, after)
        assert layer.bias is not None
        wanted = functional.linear(x.float(), new.to(dtype).float(), layer.bias.float())
        torch.testing.assert_close(after.float(), wanted, rtol=0.02, atol=0.1)


def test_released_with_values_its_own_memory_is_never_read() -> None:
    layer, plain = layers(torch.float32, 40)
    layer.release(plain.weight.detach())
    assert torch.equal(bits(values(layer.weight)), bits(plain.weight.detach()))


USES: dict[str, Callable[[ColumnLinear], Any]] = {
    "state_dict": lambda layer: layer.state_dict(),
    "data": lambda layer: layer.weight.data,
    "detach": lambda layer: layer.weight.detach(),
    "clone": lambda layer: layer.weight.clone(),
    "sum": lambda layer: layer.weight.sum(),
    "plus": lambda layer: layer.weight + 1,
    "item": lambda layer: layer.weight[0, 0],
    "numpy": lambda layer: np.asarray(layer.weight),
    "address": lambda layer: layer.weight.data_ptr(),
    "product": lambda layer: torch.ones(1, K) @ layer.weight.t(),
    "linear": lambda layer: functional.linear(torch.ones(1, K), layer.weight),
    "embedding": lambda layer: functional.embedding(torch.tensor([1]), layer.weight),
    "zero_": lambda layer: layer.weight.zero_(),
    "init": lambda layer: nn.init.zeros_(layer.weight),
    "copy_": lambda layer: layer.weight.copy_(torch.ones(40, K)),
    "written into": lambda layer: torch.ones(40, K).copy_(layer.weight),
    "element": lambda layer: layer.weight.__setitem__((0, 0), 1.0),
    "data set": lambda layer: setattr(layer.weight, "data", torch.ones(40, K)),
    "out": lambda layer: torch.add(torch.ones(40, K), 1, out=layer.weight),
    "foreach": lambda layer: torch._foreach_add_([layer.weight], 1.0),
    "to": lambda layer: layer.to(torch.float64),
    "requires_grad_": lambda layer: layer.requires_grad_(True),
    "requires_grad": lambda layer: setattr(layer.weight, "requires_grad", True),
    "deepcopy": lambda layer: copy.deepcopy(layer),
    "saved": lambda layer: torch.save(layer, io.BytesIO()),
    "load_state_dict": lambda layer: layer.load_state_dict(
        {"weight": torch.ones(40, K), "bias": torch.ones(40)}, strict=False
    ),
    "gradient": lambda layer: layer(torch.ones(1, K, requires_grad=True)).sum().backward(),
}


@pytest.mark.parametrize("use", USES)
def test_any_other_use_is_refused_and_says_what_to_call(use: str) -> None:
    layer = layers(torch.float32, 40)[0]
    assert isinstance(layer, ColumnLinear)
    plain = layer.weight.detach().clone()
    layer.release()
    with pytest.raises((WeightReleased, RuntimeError), match="stored packed only"):
        USES[use](layer)
    assert torch.equal(bits(values(layer.weight)), bits(plain))


def test_a_row_layers_gradient_is_refused_too() -> None:
    layer = layers(torch.float32, 40)[1]
    layer.release()
    with pytest.raises(WeightReleased, match="packed=False"):
        layer(torch.ones(1, K, requires_grad=True)).sum().backward()


def test_a_tied_matrix_is_stored_once_for_lookup_and_head() -> None:
    group = Group.single()
    embed = VocabEmbedding(130, 48, group=group)
    nn.init.normal_(embed.weight).requires_grad_(False)
    embed.weight.data[7, 3] = -0.0
    head = VocabHead(130, 48, group=group, weight=embed.weight)
    ids, x = torch.tensor([0, 7, 129, 7]), torch.randn(2, 48)
    wanted = embed(ids), head(x)
    head.linear.release()
    assert head.weight is embed.weight and is_released(embed.weight)
    assert torch.equal(bits(embed(ids)), bits(wanted[0])) and torch.equal(head(x), wanted[1])
    for wrong in (-1, 130, 190):
        with pytest.raises(IndexError):
            embed(torch.tensor([3, wrong]))


@pytest.mark.parametrize("keep", [True, False])
def test_an_adapter_is_merged_into_the_packed_form_and_taken_out_again(keep: bool) -> None:
    layer, twin = layers(torch.bfloat16, 40)[0], layers(torch.bfloat16, 40)[0]
    for one in (layer, twin):
        assert isinstance(one, ColumnLinear)
        one.weight.data[0] = 1.0
        one.adapter = ColumnAdapter(one.weight, one.parts, one.group, 4, 2.0)
        for factor in one.adapter.parameters():
            nn.init.normal_(factor, generator=torch.Generator().manual_seed(3)).requires_grad_(False)
    before = layer.weight.detach().clone()
    layer.release()
    x = torch.randn(3, K).bfloat16()
    assert torch.equal(layer(x), twin(x)), "beside it"
    for one in (layer, twin):
        assert one.adapter is not None
        one.adapter.merge(one.weight, keep)
    assert torch.equal(values(layer.weight), twin.weight) and not torch.equal(values(layer.weight), before)
    assert torch.equal(layer(x), twin(x))
    for one in (layer, twin):
        assert one.adapter is not None
        one.adapter.unmerge(one.weight)
    assert torch.equal(values(layer.weight), twin.weight)
    assert torch.equal(values(layer.weight), before) or not keep


def test_what_the_kernels_do_not_multiply_stays_plain_and_takes_over_the_values() -> None:
    group = Group.single()
    half = ColumnLinear(K, group.shards(40), group=group, dtype=torch.float16)
    half.release(torch.ones(40, K))
    assert not is_released(half.weight) and torch.equal(half.weight, torch.ones(40, K).half())
    layer = ColumnLinear(K, group.shards(40), group=group)
    layer.weight = nn.Parameter(torch.ones(40, K))
    with pytest.raises(ConfigError, match="sharded"):
        layer.release()
