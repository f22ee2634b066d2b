"""Every parallel layer against its dense twin, forward and backward, at several sizes; and the same bits at all of
them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from parallel.attention.heads import HeadLayout
from parallel.layers.dropout import PLAIN
from parallel.layers.linear import ColumnLinear, RowLinear, reduce_sum
from parallel.ranks.group import Group
from parallel.sharding.rules import Part, rule_of
from parallel.vocabulary.cross_entropy import vocab_cross_entropy
from parallel.vocabulary.vocab_parallel import VocabEmbedding, VocabHead

SIZES = [1, 2, 3, 4]
TOKENS, D_IN, D_OUT, HEADS = 7, 24, 130, 5


def _fill(layer: torch.nn.Module, full: dict[str, Tensor], rank: int) -> None:
    for name, parameter in layer.named_parameters():
        parameter.data = rule_of(parameter).take(full[name], rank).clone()


def _grads(layer: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}


def _column(group: Group, full: dict[str, Tensor], x: Tensor, grad: Tensor) -> dict[str, Any]:
    layer = ColumnLinear(D_IN, group.shards(D_OUT), group=group)
    _fill(layer, full, group.rank)
    x = x.clone().requires_grad_()
    y = layer(x)
    start, stop = group.shards(D_OUT).range(group.rank)
    y.backward(grad[:, start:stop])
    return {"y": y.detach(), "dx": x.grad, **_grads(layer)}


def _row(group: Group, full: dict[str, Tensor], x: Tensor, grad: Tensor) -> dict[str, Any]:
    shards = group.shards(D_OUT)
    layer = RowLinear(shards, D_IN, group=group)
    _fill(layer, full, group.rank)
    start, stop = shards.range(group.rank)
    x = x[:, start:stop].clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return {"y": y.detach(), "dx": x.grad, **_grads(layer)}


def _two_rows(group: Group, full: dict[str, Tensor], x: Tensor, grad: Tensor) -> dict[str, Any]:
    heads = group.shards(HEADS).scaled(4)
    wide = group.shards(D_OUT, num_leaves=heads.num_leaves)
    first, second = RowLinear(heads, D_IN, group=group), RowLinear(wide, D_IN, group=group)
    _fill(first, {"weight": full["weight"][:, :20], "bias": full["bias"]}, group.rank)
    _fill(second, {"weight": full["weight"], "bias": full["bias"] * 2}, group.rank)
    inputs = [
        x[:, slice(*heads.range(group.rank))].clone().requires_grad_(),
        x[:, slice(*wide.range(group.rank))].clone().requires_grad_(),
    ]
    before = sum(group.talk.counts.values()) if group.size > 1 else 0
    y = reduce_sum(PLAIN, first.partial(inputs[0]), second.partial(inputs[1]))
    issued = sum(group.talk.counts.values()) - before if group.size > 1 else 0
    y.backward(grad)
    return {
        "y": y.detach(),
        "issued": issued,
        "bias": _grads(second)["bias"],
        "weight": second.weight.grad,
        "dx": inputs[1].grad,
    }


def _dense(x: Tensor, full: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    x, weight, bias = (t.clone().requires_grad_() for t in (x, full["weight"], full["bias"]))
    y = functional.linear(x, weight, bias)
    y.backward(grad)
    return {"y": y.detach(), "dx": x.grad, "weight": weight.grad, "bias": bias.grad}  # type: ignore[dict-item]


def _case(d_in: int, d_out: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    full = {"weight": torch.randn(d_out, d_in, generator=generator), "bias": torch.randn(d_out, generator=generator)}
    return full, torch.randn(TOKENS, d_in, generator=generator), torch.randn(TOKENS, d_out, generator=generator)


def _close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("comm", ["shm", "gloo"])
def test_column_linear_equals_its_dense_twin(ranks: Any, size: int, comm: str) -> None:
    full, x, grad = _case(D_IN, D_OUT)
    wanted = _dense(x, full, grad)
    results = ranks(size, _column, full, x, grad, comm=comm)
    _close(torch.cat([r["y"] for r in results], 1), wanted["y"])
    _close(torch.cat([r["weight"] for r in results]), wanted["weight"])
    _close(torch.cat([r["bias"] for r in results]), wanted["bias"])
    for result in results:
        _close(result["dx"], wanted["dx"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("comm", ["shm", "gloo"])
def test_row_linear_equals_its_dense_twin_and_its_bias_gradient_is_replicated(ranks: Any, size: int, comm: str) -> None:
    full, x, grad = _case(D_OUT, D_IN)
    wanted = _dense(x, full, grad)
    results = ranks(size, _row, full, x, grad, comm=comm)
    _close(torch.cat([r["weight"] for r in results], 1), wanted["weight"])
    _close(torch.cat([r["dx"] for r in results], 1), wanted["dx"])
    for result in results:
        _close(result["y"], wanted["y"])
        _close(result["bias"], wanted["bias"])


def test_two_row_layers_share_one_reduction(ranks: Any) -> None:
    full, x, grad = _case(D_OUT, D_IN)
    wanted = (
        functional.linear(x, full["weight"]) + functional.linear(x[:, :20], full["weight"][:, :20]) + 3 * full["bias"]
    )
    for size in SIZES:
        for result in ranks(size, _two_rows, full, x, grad):
            _close(result["y"], wanted)
            assert result["issued"] == (1 if size > 1 else 0)


@pytest.mark.parametrize("layer", [_column, _row, _two_rows])
def test_sums_over_a_sharded_axis_have_the_same_bits_at_every_size(ranks: Any, layer: Any) -> None:
    full, x, grad = _case(D_IN, D_OUT) if layer is _column else _case(D_OUT, D_IN)
    shared = "dx" if layer is _column else "y"
    single = layer(Group.single(), full, x, grad)[shared]
    for size in (2, 3, 4):
        for comm in ("shm", "gloo"):
            for result in ranks(size, layer, full, x, grad, comm=comm):
                assert torch.equal(result[shared], single), f"{layer.__name__} at {size} ranks over {comm}"


def _vocabulary(group: Group, table: Tensor, ids: Tensor, x: Tensor, targets: Tensor) -> dict[str, Any]:
    vocab, d_model = table.shape
    embedding = VocabEmbedding(vocab, d_model, group=group)
    _fill(embedding, {"weight": table}, group.rank)
    head = VocabHead(vocab, d_model, group=group, weight=embedding.weight)
    x = x.clone().requires_grad_()
    logits = head(x + embedding(ids))
    loss = vocab_cross_entropy(logits, targets, head.shards, group)
    loss.backward()
    with torch.no_grad():
        best, full = head.argmax(logits), head.gather(logits)
        log_probs = head.log_probs(logits, targets.clamp(0))
        gathered = full.gather(1, targets.clamp(0)[:, None])[:, 0] - head.full_log_normaliser(full)
    return {"loss": loss.detach(), "dx": x.grad, "dw": embedding.weight.grad, "full": full.detach(), "best": best.ids,
            "log_probs": log_probs, "gathered": gathered}  # fmt: skip


@pytest.mark.parametrize("vocab", [3, 97, 1031])
def test_embedding_head_and_loss_equal_their_dense_twins(ranks: Any, vocab: int) -> None:
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(vocab, 20, generator=generator)
    ids, targets = (torch.randint(vocab, (9,), generator=generator) for _ in range(2))
    targets[4] = -100
    x = torch.randn(9, 20, generator=generator)
    weight, dense_x = table.clone().requires_grad_(), x.clone().requires_grad_()
    logits = functional.linear(dense_x + functional.embedding(ids, weight), weight)
    wanted = functional.cross_entropy(logits, targets, ignore_index=-100)
    wanted.backward()
    bits = set()
    for size in SIZES:
        results = ranks(size, _vocabulary, table, ids, x, targets)
        _close(torch.cat([r["dw"] for r in results]), weight.grad)  # type: ignore[arg-type]
        for result in results:
            _close(result["loss"], wanted.detach())
            _close(result["dx"], dense_x.grad)  # type: ignore[arg-type]
            _close(result["full"], logits.detach())
            assert torch.equal(result["best"], logits.argmax(1))
            assert torch.equal(result["log_probs"], result["gathered"])
            bits.add(result["log_probs"].numpy().tobytes() + result["dx"].numpy().tobytes())
    assert len(bits) == 1, "log-probabilities and input gradients must not depend on the number of ranks"


def _shared_heads(group: Group, x: Tensor, weights: Tensor, full: dict[str, Tensor]) -> dict[str, Any]:
    layout = HeadLayout.of(group, HEADS, 1, 4)
    layer = ColumnLinear(D_IN, (Part(HEADS * 4, layout.head_shards), Part(4)), group=group)
    _fill(layer, full, group.rank)
    x = x.clone().requires_grad_()
    y = layer(x)
    q = y[:, :-4].view(TOKENS, layout.n_local, 4)
    heads = layout.kv_heads(group)
    assert heads is not None, "they share one"
    kv, _ = heads.spread_both(y[:, None, -4:], y[:, None, -4:])
    mine = weights[:, layout.first : layout.first + layout.n_local]
    ((q * kv) * mine).sum().backward()
    return {"dx": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}  # type: ignore[union-attr]


def test_the_shared_key_value_head_gets_every_heads_gradient_once(ranks: Any) -> None:
    full, x, _ = _case(D_IN, HEADS * 4 + 4)
    weights = torch.randn(TOKENS, HEADS, 4)
    dense = {k: v.clone().requires_grad_() for k, v in full.items()}
    dense_x = x.clone().requires_grad_()
    y = functional.linear(dense_x, dense["weight"], dense["bias"])
    (y[:, :-4].view(TOKENS, HEADS, 4) * y[:, None, -4:] * weights).sum().backward()
    bits = set()
    for size in SIZES:
        for result in ranks(size, _shared_heads, x, weights, full):
            _close(result["dx"], dense_x.grad)  # type: ignore[arg-type]
            _close(result["weight"][-4:], dense["weight"].grad[-4:])  # type: ignore[index]
            _close(result["bias"][-4:], dense["bias"].grad[-4:])  # type: ignore[index]
            bits.add(result["weight"][-4:].numpy().tobytes() + result["dx"].numpy().tobytes())
    assert len(bits) == 1


def test_the_packed_weight_follows_an_update_in_place() -> None:
    layer = ColumnLinear(8, Group.single().shards(6), group=Group.single())
    with torch.no_grad():
        layer.weight.fill_(1.0), layer.bias.zero_()  # type: ignore[union-attr,func-returns-value]
        x = torch.ones(2, 8)
        assert torch.equal(layer(x), torch.full((2, 6), 8.0))
        layer.weight.mul_(2.0)
        assert torch.equal(layer(x), torch.full((2, 6), 16.0))
