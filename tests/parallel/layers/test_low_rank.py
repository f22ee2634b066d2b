"""The low-rank branch of either kind of linear layer against its dense twin, forward and backward; the same bits at
every size, with tokens divided or not, merged or not.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel.errors import ConfigError
from parallel.layers.dropout import ADAPTER, DropoutSite, Dropping, LayerPass, Odds, token_keys
from parallel.layers.linear import ColumnLinear, RowLinear, reduce_sum
from parallel.layers.low_rank import Adapter, ColumnAdapter, RowAdapter
from parallel.ranks.group import Group
from parallel.ranks.sequence_parallel import token_shards
from parallel.sharding.rules import Part, rule_of

SIZES = [1, 2, 3, 4]
TOKENS, D_IN, D_OUT, RANK, SCALE = 9, 24, 136, 3, 1.5
HEADS, HEAD = 5, 4


def _fill(module: nn.Module, full: dict[str, Tensor], rank: int) -> None:
    for name, parameter in module.named_parameters():
        parameter.data = rule_of(parameter).take(full[name], rank).to(parameter.dtype, copy=True)
        parameter.requires_grad = "adapter" in name


def _case(d_in: int, d_out: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    made = torch.Generator().manual_seed(3)
    shapes = {"weight": (d_out, d_in), "bias": (d_out,), "adapter.a": (RANK, d_in), "adapter.b": (d_out, RANK)}
    full = {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}
    return full, torch.randn(TOKENS, d_in, generator=made), torch.randn(TOKENS, d_out, generator=made)


def _dense(full: dict[str, Tensor], x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x, a, b = (t.clone().requires_grad_() for t in (x, full["adapter.a"], full["adapter.b"]))
    y = functional.linear(x, full["weight"], full["bias"]) + SCALE * functional.linear(functional.linear(x, a), b)
    y.backward(grad)
    return {"y": y.detach(), "dx": x.grad, "a": a.grad, "b": b.grad}  # type: ignore[dict-item]


def _adapter(layer: ColumnLinear | RowLinear) -> Adapter:
    assert layer.adapter is not None, "given before"
    return layer.adapter


def _run(layer: ColumnLinear | RowLinear, full: dict[str, Tensor], x: Tensor, tokens: Any) -> tuple[Tensor, Tensor]:
    if isinstance(layer, ColumnLinear):
        layer.adapter = ColumnAdapter(layer.weight, layer.parts, layer.group, RANK, SCALE)
    else:
        layer.adapter = RowAdapter(layer.weight, layer.shards, layer.group, RANK, SCALE)
    _fill(layer, full, layer.group.rank)
    x = x.to(layer.weight.dtype).clone().requires_grad_()
    return x, layer(x, LayerPass(tokens=tokens))


def _found(layer: ColumnLinear | RowLinear, x: Tensor, y: Tensor) -> dict[str, Any]:
    adapter = _adapter(layer)
    assert layer.weight.grad is None and layer.bias is not None and layer.bias.grad is None, "the base is frozen"
    with torch.no_grad():
        again = layer(x)
    return {"y": y.detach(), "dx": x.grad, "a": adapter.a.grad, "b": adapter.b.grad, "again": again}


def _parts(group: Group, kind: str) -> Any:
    if kind == "plain":
        return group.shards(D_OUT)
    heads = group.shards(HEADS).scaled(HEAD)
    q, kv = Part(HEADS * HEAD, heads), Part(HEAD)
    return (q, kv, kv) if kind == "shared" else (q, q, q)


WIDTHS = {"plain": D_OUT, "shared": HEADS * HEAD + 2 * HEAD, "blocks": 3 * HEADS * HEAD}


def _column(
    group: Group, kind: str, full: dict[str, Tensor], x: Tensor, grad: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    layer = ColumnLinear(D_IN, _parts(group, kind), group=group, dtype=dtype)
    x, y = _run(layer, full, x, None)
    y.backward(rule_of(layer.weight).take(grad.t(), group.rank).t().to(dtype))
    return {**_found(layer, x, y), "shared": "a dx"}


def _row(
    group: Group, kind: str, full: dict[str, Tensor], x: Tensor, grad: Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    shards = group.shards(D_OUT) if kind == "plain" else group.shards(HEADS).scaled(HEAD)
    layer = RowLinear(shards, D_IN, group=group, dtype=dtype)
    x, y = _run(layer, full, x[:, slice(*shards.range(group.rank))], None)
    y.backward(grad.to(dtype))
    return {**_found(layer, x, y), "shared": "b y"}


def _close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def _join(results: list[dict[str, Any]], rule: Any, name: str, dim: int) -> Tensor:
    shards = [r[name].t() if dim == 1 else r[name] for r in results]
    joined = rule.join(shards)
    return joined.t() if dim == 1 else joined  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", WIDTHS)
def test_a_column_adapter_equals_its_dense_twin(ranks: Any, size: int, kind: str) -> None:
    full, x, grad = _case(D_IN, WIDTHS[kind])
    wanted = _dense(full, x, grad)
    results = ranks(size, _column, kind, full, x, grad, torch.float32)
    rule = rule_of(ColumnLinear(D_IN, _parts(Group(0, size), kind), group=Group(0, size)).weight)
    _close(_join(results, rule, "y", 1), wanted["y"])
    _close(_join(results, rule, "b", 0), wanted["b"])
    for result in results:
        _close(result["dx"], wanted["dx"])
        _close(result["a"], wanted["a"])
        assert torch.equal(result["again"], result["y"]), "with and without gradients"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["plain", "heads"])
def test_a_row_adapter_equals_its_dense_twin(ranks: Any, size: int, kind: str) -> None:
    full, x, grad = _case(D_OUT if kind == "plain" else HEADS * HEAD, D_IN)
    wanted = _dense(full, x, grad)
    results = ranks(size, _row, kind, full, x, grad, torch.float32)
    _close(torch.cat([r["a"] for r in results], 1), wanted["a"])
    _close(torch.cat([r["dx"] for r in results], 1), wanted["dx"])
    for result in results:
        _close(result["y"], wanted["y"])
        _close(result["b"], wanted["b"])
        assert torch.equal(result["again"], result["y"]), "with and without gradients"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layer", "kind"), [(_column, "plain"), (_column, "shared"), (_row, "plain"), (_row, "heads")])
def test_every_sum_has_the_same_bits_at_every_size(ranks: Any, layer: Any, kind: str, dtype: torch.dtype) -> None:
    wide = WIDTHS.get(kind, HEADS * HEAD)
    full, x, grad = _case(D_IN, wide) if layer is _column else _case(wide, D_IN)
    single = layer(Group.single(), kind, full, x, grad, dtype)
    for size in (2, 3, 4, 6):
        for comm in ("shm", "gloo") if size == 3 else ("shm",):
            for result in ranks(size, layer, kind, full, x, grad, dtype, comm=comm):
                for name in single["shared"].split():
                    assert torch.equal(result[name], single[name]), f"{name} at {size} ranks over {comm}"


def _back(full: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer from the outputs back to the inputs, of the same numbers."""
    return {
        "weight": full["weight"].t(), "bias": full["bias"][:D_IN],
        "adapter.a": full["adapter.b"].t(), "adapter.b": full["adapter.a"].t(),
    }  # fmt: skip


def _both(group: Group, divided: bool, full: dict[str, Tensor], x: Tensor, grad: Tensor) -> dict[str, Any]:
    """A column layer, then two row layers that share a reduction, the first with an adapter; tokens divided or not."""
    group = replace(group, sequence_parallel=divided)
    tokens = token_shards(TOKENS, group)
    mine = slice(*tokens.range(group.rank)) if tokens else slice(None)
    up = ColumnLinear(D_IN, group.shards(D_OUT), group=group)
    x, h = _run(up, full, x[mine], tokens)
    down, other = (RowLinear(group.shards(D_OUT), D_IN, group=group) for _ in range(2))
    down.adapter = RowAdapter(down.weight, down.shards, group, RANK, SCALE)
    back = _back(full)
    _fill(down, back, group.rank)
    _fill(other, back, group.rank)
    before = sum(group.comm.counts.values()) if group.comm else 0
    y = reduce_sum(LayerPass(tokens=tokens), down.partial(h.tanh()), other.partial(h.sin()))
    issued = sum(group.comm.counts.values()) - before if group.comm else 0
    y.backward(grad[mine, :D_IN])
    first, second = _adapter(up), _adapter(down)
    return {"y": y.detach(), "dx": x.grad, "a": first.a.grad, "b": second.b.grad, "issued": issued}


def test_dividing_tokens_changes_no_bit_and_the_branch_adds_no_collective_to_the_forward(ranks: Any) -> None:
    full, x, grad = _case(D_IN, D_OUT)
    single = _both(Group.single(), False, full, x, grad)
    for size in (2, 3):
        for divided in (False, True):
            results = ranks(size, _both, divided, full, x, grad)
            for name in ("y", "dx"):
                whole = torch.cat([r[name] for r in results]) if divided else results[-1][name]
                assert torch.equal(whole, single[name]), f"{name} at {size} ranks, tokens divided: {divided}"
            for result in results:
                assert torch.equal(result["a"], single["a"]) and torch.equal(result["b"], single["b"])
                assert result["issued"] == 1


@pytest.mark.parametrize("keep", [True, False])
def test_merging_moves_the_branch_into_the_weight_and_unmerging_takes_it_out(keep: bool) -> None:
    group = Group.single()
    full, x, _ = _case(D_IN, D_OUT)
    layer = ColumnLinear(D_IN, group.shards(D_OUT), group=group)
    with torch.no_grad():
        _, before = _run(layer, full, x, None)
        adapter = _adapter(layer)
        adapter.merge(layer.weight, keep)
        _close(layer(x), before)
        _close(layer.weight, full["weight"] + SCALE * full["adapter.b"] @ full["adapter.a"])
        adapter.unmerge(layer.weight)
        assert torch.equal(layer.weight, full["weight"]) == keep, "the very bits are back where a copy was kept"
        _close(layer(x), before)


def _dropped(group: Group, full: dict[str, Tensor], x: Tensor, grad: Tensor) -> dict[str, Any]:
    """A column and a row layer one after the other, with masks on the way into both branches."""
    dropping = Dropping(5, token_keys([0, 1], [4, 5]))
    shards = group.shards(D_OUT)
    up, down = ColumnLinear(D_IN, shards, group=group), RowLinear(shards, D_IN, group=group)
    up.adapter = ColumnAdapter(up.weight, up.parts, group, RANK, SCALE, DropoutSite(0.3, 7, ADAPTER, group))
    down.adapter = RowAdapter(down.weight, shards, group, RANK, SCALE, DropoutSite(0.4, 8, ADAPTER, group))
    _fill(up, full, group.rank)
    _fill(down, _back(full), group.rank)
    x = x.clone().requires_grad_()
    now = LayerPass(dropping=dropping)
    y = down(up(x, now), now)
    y.backward(grad[:, :D_IN])
    return {
        "y": y.detach(), "dx": x.grad, "up.a": up.adapter.a.grad, "down.b": down.adapter.b.grad,
        "up.b": up.adapter.b.grad, "down.a": down.adapter.a.grad,
    }  # fmt: skip


def test_dropout_on_the_way_into_a_branch_equals_its_dense_twin_with_the_same_bits_at_every_size(ranks: Any) -> None:
    full, x, grad = _case(D_IN, D_OUT)
    back = _back(full)
    leaves = {"dx": x, "up.a": full["adapter.a"], "up.b": full["adapter.b"], "down.a": back["adapter.a"],
              "down.b": back["adapter.b"]}  # fmt: skip
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    keys = Dropping(5, token_keys([0, 1], [4, 5]))

    def branch(x: Tensor, which: str, p: float, layer: int) -> Tensor:
        kept = Odds(p).factors(keys.site_keys(layer, ADAPTER), torch.arange(x.shape[1]))
        return SCALE * functional.linear(functional.linear(x * kept, leaves[f"{which}.a"]), leaves[f"{which}.b"])

    h = functional.linear(leaves["dx"], full["weight"], full["bias"]) + branch(leaves["dx"], "up", 0.3, 7)
    y = functional.linear(h, back["weight"], back["bias"]) + branch(h, "down", 0.4, 8)
    y.backward(grad[:, :D_IN])
    single = _dropped(Group.single(), full, x, grad)
    for size in SIZES:
        results = ranks(size, _dropped, full, x, grad)
        for result in results:
            for name in ("y", "dx", "up.a", "down.b"):
                assert torch.equal(result[name], single[name]), f"{name} at {size} ranks"
        found = {**results[0], "up.b": torch.cat([r["up.b"] for r in results]),
                 "down.a": torch.cat([r["down.a"] for r in results], 1)}  # fmt: skip
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            torch.testing.assert_close(found[name], leaf.grad, rtol=1e-4, atol=1e-4 * float(leaf.grad.abs().max()))
        torch.testing.assert_close(found["y"], y.detach(), rtol=1e-4, atol=1e-4 * float(y.detach().abs().max()))


def test_a_merged_adapter_cannot_be_trained_by_mistake() -> None:
    group = Group.single()
    full, x, _ = _case(D_OUT, D_IN)
    layer = RowLinear(group.shards(D_OUT), D_IN, group=group)
    _run(layer, full, x, None)
    _adapter(layer).merge(layer.weight, keep=True)
    with pytest.raises(ConfigError, match="unmerge it first"):
        layer(x)
    with torch.no_grad():
        layer(x)
