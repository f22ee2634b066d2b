"""Dropout masks are functions of keys: kernels, torch's formula and plain Python agree; shares and halves are right."""

from __future__ import annotations

import math

import pytest
import torch

from parallel.attention.attend import AttentionSpec, Causal
from parallel.attention.forward_pass import Pass
from parallel.errors import ConfigError
from parallel.layers.dropout import ATTENDED, MLP, DropoutSite, Dropping, LayerPass, Odds, mix_key, mix_keys, token_keys
from parallel.ranks.group import Group

LENGTHS = [70, 1, 130, 17]
WORD = (1 << 64) - 1
DROPPING = Dropping(7, token_keys([0, 1, 2, 3], LENGTHS))


def drawn(key: int, column: int) -> int:
    """The formula once more, in plain integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    return mix(mix((column * 0x9E3779B9 + key) & 0xFFFFFFFF) ^ (key >> 32))


def test_keys_of_tensors_are_those_of_plain_integers() -> None:
    values = [0, 1, 5, -3, 2**62, -(2**63)]
    signed = mix_keys(torch.tensor(values)).tolist()
    assert [x & WORD for x in signed] == [mix_key(x & WORD) for x in values]


def test_factors_follow_the_formula() -> None:
    odds, keys = Odds(0.4), mix_keys(torch.arange(3))
    factors = odds.factors(keys, torch.arange(50, 60))
    for row, key in enumerate(keys.tolist()):
        for i, column in enumerate(range(50, 60)):
            kept = drawn(key & WORD, column) >= odds.threshold
            assert factors[row, i].item() == pytest.approx(1 / 0.6 if kept else 0.0)


def dropping_by(backend: str) -> Pass:
    return Pass.packed(LENGTHS, backend=backend, dropping=DROPPING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 16, 33, 100])
def test_the_native_kernel_drops_what_the_formula_says(width: int, dtype: torch.dtype) -> None:
    site = DropoutSite(0.3, 2, MLP, Group.single())
    x = torch.randn(sum(LENGTHS), width).to(dtype)
    factors = site.odds.factors(DROPPING.site_keys(2, MLP), torch.arange(width))
    assert torch.equal(site(x, LayerPass(dropping=DROPPING)), (x.float() * factors).to(dtype))


def test_a_share_p_is_dropped_the_mean_stays_and_places_are_unlike() -> None:
    site, x = DropoutSite(0.25, 0, MLP, Group.single()), torch.ones(218, 400)
    y = site(x, LayerPass(dropping=DROPPING))
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)
    for other in (
        DropoutSite(0.25, 1, MLP, Group.single())(x, LayerPass(dropping=DROPPING)),
        DropoutSite(0.25, 0, ATTENDED, Group.single())(x, LayerPass(dropping=DROPPING)),
        site(x, LayerPass(dropping=Dropping(8, DROPPING.keys_T))),
        y.roll(1, 0),
        y.roll(1, 1),
    ):
        agreeing = ((y == 0) == (other == 0)).float().mean().item()
        assert agreeing == pytest.approx(0.25**2 + 0.75**2, abs=0.01)  # as independent draws agree


def test_divided_tokens_and_columns_get_their_part_of_the_mask() -> None:
    x = torch.randn(218, 24)
    sites = [DropoutSite(0.5, 1, MLP, Group(rank, 3)) for rank in range(3)]
    shards = Group(0, 3).shards(218)
    whole = sites[0](x, LayerPass(dropping=DROPPING))
    parts = []
    for rank, site in enumerate(sites):
        start, stop = shards.range(rank)
        parts.append(site(x[start:stop], LayerPass(dropping=DROPPING, tokens=shards)))
    assert torch.equal(torch.cat(parts), whole)
    now = LayerPass(dropping=DROPPING)
    columns = [sites[0](x[:, i : i + 6].contiguous(), now, first_column=i) for i in range(0, 24, 6)]
    assert torch.equal(torch.cat(columns, 1), whole)


def test_the_backward_multiplies_with_the_same_mask() -> None:
    site, x = DropoutSite(0.5, 1, MLP, Group.single()), torch.randn(218, 24, requires_grad=True)
    y = site(x, LayerPass(dropping=DROPPING))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(grad, torch.where(y == 0, 0.0, 2.0))


@pytest.mark.parametrize(
    ("kv_heads", "heads", "head_dim", "dtype"),
    [(4, 4, 16, torch.float32), (1, 4, 24, torch.float32), (4, 4, 8, torch.bfloat16), (1, 1, 64, torch.float32)],
)
def test_the_attention_kernel_drops_probabilities_as_plain_torch_does(
    kv_heads: int, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    generator, total = torch.Generator().manual_seed(0), sum(LENGTHS)
    q, k, v, grad = (
        torch.randn(total, n, head_dim, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads, heads)
    )
    slopes = 2.0 ** -torch.arange(1.0, heads + 1)
    spec = AttentionSpec(1, 1 / math.sqrt(head_dim), slopes, 0.2, range(3, 3 + heads))
    results = []
    for backend in ("cpu", "eager"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        o = dropping_by(backend).attended(spec, *inputs)
        results.append([o, *torch.autograd.grad(o, inputs, grad)])
    plain = Causal(LENGTHS, "cpu")(spec, q, k, v)
    assert not torch.allclose(results[0][0].float(), plain.float(), atol=0.1)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2 if dtype is torch.bfloat16 else 3e-6, rtol=1e-2)


def test_heads_have_masks_by_their_global_number() -> None:
    q = torch.randn(sum(LENGTHS), 4, 16)
    whole = dropping_by("cpu").attended(AttentionSpec(0, 0.25, None, 0.5, range(4)), q, q, q)
    part = dropping_by("cpu").attended(AttentionSpec(0, 0.25, None, 0.5, range(2, 4)), *(q[:, 2:],) * 3)
    assert torch.equal(part, whole[:, 2:])


def test_a_backend_that_cannot_drop_gives_way_to_one_that_can() -> None:
    q, spec = torch.randn(sum(LENGTHS), 2, 16), AttentionSpec(0, 0.25, None, 0.5, range(2))
    ours, theirs = (dropping_by(backend).attended(spec, q, q, q) for backend in ("sdpa", "eager"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_probability_of_one_leaves_nothing_as_in_torch(dtype: torch.dtype) -> None:
    x = torch.randn(sum(LENGTHS), 64).to(dtype).requires_grad_()
    site = DropoutSite(1.0, 0, MLP, Group.single())
    dropped = site(x, LayerPass(dropping=DROPPING))
    dropped.sum().backward()
    assert not dropped.any() and x.grad is not None and not x.grad.any()
    assert torch.equal(site(x, LayerPass()), x)
    q, spec = torch.randn(sum(LENGTHS), 2, 16).requires_grad_(), AttentionSpec(0, 0.25, None, 1.0, range(2))
    attended = dropping_by("cpu").attended(spec, q, q, q)
    attended.sum().backward()
    assert not attended.any() and q.grad is not None and not q.grad.any()


def test_wrong_probabilities_and_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"dropout probability 1.5 is outside \[0, 1\]"):
        DropoutSite(1.5, 0, MLP, Group.single())
    with pytest.raises(ConfigError, match="dropout keys of 218 tokens for 9 in the pass"):
        Pass.packed([9], dropping=DROPPING)
