"""The C++ attention kernel: right against float64, and the same bits whatever stands around a row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from parallel.attention.attend import AttentionMetadata, AttentionSpec
from parallel.attention.cpu import RunCache
from parallel.attention.eager import attend
from parallel.attention.kv_cache import KVLayout
from parallel.attention.metadata import starts_of
from parallel.native import attention as native
from parallel.native.compiled.library import set_threads

LENGTH = 150
LAYER = 0


@dataclass(frozen=True)
class Heads:
    """One layer's local heads and the values of a sequence, as views of a fused row."""

    N: int
    K: int
    H: int
    alibi: bool
    dtype: torch.dtype

    def qkv(self, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        row = torch.randn(tokens, self.N + 2 * self.K, self.H, generator=torch.Generator().manual_seed(seed)).to(
            self.dtype
        )
        q, k, v = row.split((self.N, self.K, self.K), dim=1)
        return q, k, v

    @property
    def spec(self) -> AttentionSpec:
        slopes = 2.0 ** -torch.linspace(1, 8, self.N) if self.alibi else None
        return AttentionSpec(LAYER, 1 / math.sqrt(self.H), slopes)

    def read_by(self, first: int, last: int) -> tuple[slice, tuple[int, int]]:
        """The kv heads that some of the query heads read, and how."""
        size = self.N // self.K
        return slice(first // size, -(-last // size)), (size, first % size)

    def cache(self, blocks: int, block_size: int = 16) -> RunCache:
        layout = KVLayout(
            n_layers=1, n_kv_heads=self.K, head_dim=self.H, block_size=block_size, dtype=self.dtype, device="cpu"
        )
        return RunCache(layout, blocks)


SHAPES = [
    (4, 4, 64, False),
    (3, 3, 25, True),
    (5, 1, 20, False),
    (2, 2, 8, False),
    (2, 2, 48, True),
    (4, 1, 80, True),
    (2, 2, 96, False),
    (7, 1, 128, False),
    (2, 1, 256, False),
    (1, 1, 33, True),
    (8, 2, 32, False),
    (6, 3, 20, True),
]
CASES = [
    pytest.param(Heads(*shape, dtype), id="-".join(map(str, (*shape[:3], "alibi" * shape[3], str(dtype)[6:]))))
    for shape in SHAPES
    for dtype in (torch.float32, torch.bfloat16)
]
every_case = pytest.mark.parametrize("heads", CASES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    set_threads(1)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.dtype is torch.bfloat16 else torch.int32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(bits(a), bits(b))


def packed(heads: Heads, lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The training forward: output and log-sum-exp."""
    step = AttentionMetadata.packed(lengths).paged_step
    blocks = step.num_blocks
    k_cache, v_cache = (torch.full((blocks, x.shape[1], 16 * heads.H), float("nan"), dtype=heads.dtype) for x in (k, v))
    lse = torch.empty(q.shape[:2])
    o = native.forward(step, k_cache, v_cache, q, k, v, scale=heads.spec.scale, slopes=heads.spec.slopes, lse_TN=lse)
    return o, lse


def step(
    heads: Heads, cache: RunCache, meta: AttentionMetadata, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:2])
    o = native.forward(
        meta.paged_step,
        cache.keys[LAYER],
        cache.values[LAYER],
        q,
        k,
        v,
        scale=heads.spec.scale,
        slopes=heads.spec.slopes,
        lse_TN=lse,
    )
    return o, lse


def in_chunks(
    heads: Heads, chunks: Sequence[int], table: Sequence[int], cache: RunCache, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """One sequence served in steps of the given sizes."""
    parts = []
    for start, size in zip(starts_of(chunks), chunks, strict=False):
        meta = AttentionMetadata.build([size], [start + size], [table], cache.layout.block_size)
        parts.append(step(heads, cache, meta, *(x[start : start + size] for x in (q, k, v))))
    return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts])


@every_case
def test_output_and_log_sum_exp_equal_a_float64_reference(heads: Heads) -> None:
    q, k, v = heads.qkv(LENGTH)
    o, lse = packed(heads, [LENGTH], q, k, v)
    spec = replace(heads.spec, slopes=None if heads.spec.slopes is None else heads.spec.slopes.double())
    expected = attend(spec, q.double(), k.double(), v.double())
    torch.testing.assert_close(o.double(), expected, rtol=0, atol=3e-6 if heads.dtype is torch.float32 else 2e-2)
    scores = torch.einsum("qnh,cnh->qnc", q.double(), spec.by_head(k.double(), heads.N)) * spec.scale
    if spec.slopes is not None:
        positions = torch.arange(LENGTH)
        scores += spec.slopes[None, :, None] * (positions[None, None, :] - positions[:, None, None])
    scores.masked_fill_(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[:, None], float("-inf"))
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-5)


@every_case
def test_decoding_and_any_chunking_give_the_bits_of_the_training_forward(heads: Heads) -> None:
    q, k, v = heads.qkv(LENGTH)
    expected, expected_lse = packed(heads, [LENGTH], q, k, v)
    for chunks in ([1] * LENGTH, [LENGTH], [64, 64, 22], [7, 1, 80, 1, 61], [25] * 6):
        o, lse = in_chunks(heads, chunks, range(10), heads.cache(10), q, k, v)
        assert same_bits(o, expected) and same_bits(lse, expected_lse), chunks


@every_case
def test_neighbours_in_the_row_do_not_change_a_bit(heads: Heads) -> None:
    lengths = [3, LENGTH, 1, 40]
    q, k, v = heads.qkv(sum(lengths), seed=1)
    together, lse = packed(heads, lengths, q, k, v)
    for start, length in zip(starts_of(lengths), lengths, strict=False):
        part = slice(start, start + length)
        alone, lse_alone = packed(heads, [length], q[part], k[part], v[part])
        assert same_bits(together[part], alone) and same_bits(lse[part], lse_alone)


@every_case
def test_a_mixed_step_gives_each_sequence_its_own_bits_in_any_blocks_and_on_any_threads(heads: Heads) -> None:
    """Prefill chunks and decode rows of five sequences in one step, over caches of several block sizes."""
    queries, contexts = [1, 30, 1, 64, 1], [150, 90, 17, 64, 1]
    sequences = [heads.qkv(context, seed=s) for s, context in enumerate(contexts)]
    expected = torch.cat(
        [packed(heads, [c], *qkv)[0][c - n :] for n, c, qkv in zip(queries, contexts, sequences, strict=True)]
    )
    for block_size, threads in ((16, 1), (32, 2), (48, 3), (128, 2)):
        set_threads(threads)
        blocks = [-(-c // block_size) for c in contexts]
        shuffled = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(block_size)).tolist()
        tables = [shuffled[start : start + count] for start, count in zip(starts_of(blocks), blocks, strict=False)]
        cache = heads.cache(sum(blocks), block_size)
        for n, c, table, qkv in zip(queries, contexts, tables, sequences, strict=True):
            if c > n:
                in_chunks(heads, [c - n], table, cache, *(x[: c - n] for x in qkv))
        new = [
            torch.cat([x[i][c - n :] for n, c, x in zip(queries, contexts, sequences, strict=True)]) for i in range(3)
        ]
        meta = AttentionMetadata.build(queries, contexts, tables, block_size)
        o, _ = step(heads, cache, meta, new[0], new[1], new[2])
        assert same_bits(o, expected), (block_size, threads)


@every_case
def test_a_rank_with_some_of_the_heads_computes_the_same_bits(heads: Heads) -> None:
    q, k, v = heads.qkv(LENGTH)
    full, _ = packed(heads, [LENGTH], q, k, v)
    for first, last in ((0, 1), (0, (heads.N + 1) // 2), ((heads.N + 1) // 2, heads.N)):
        if first == last:
            continue
        kv, grouping = heads.read_by(first, last)
        step_ = AttentionMetadata.packed([LENGTH]).paged_step
        blocks = step_.num_blocks
        k_cache, v_cache = (torch.zeros(blocks, k[:, kv].shape[1], 16 * heads.H, dtype=heads.dtype) for _ in range(2))
        slopes = None if heads.spec.slopes is None else heads.spec.slopes[first:last].clone()
        part = native.forward(
            step_, k_cache, v_cache, q[:, first:last], k[:, kv], v[:, kv], scale=heads.spec.scale, slopes=slopes,
            grouping=grouping,
        )  # fmt: skip
        assert same_bits(part, full[:, first:last])


@every_case
def test_masked_and_stale_slots_never_contribute_even_with_inf_and_nan(heads: Heads) -> None:
    q, k, v = heads.qkv(LENGTH)
    expected, _ = packed(heads, [LENGTH], q, k, v)
    for poison in (float("nan"), float("inf")):
        cache = heads.cache(12)
        for x in (*cache.keys, *cache.values):
            x.fill_(poison)
        o, _ = in_chunks(heads, [70, 1, 79], range(1, 11), cache, q, k, v)
        assert same_bits(o, expected)
        bad = [x.clone() for x in (q, k, v)]
        for x in bad:
            x[101:] = poison  # later tokens of the same sequence
        o, _ = packed(heads, [LENGTH], *bad)
        assert same_bits(o[:101], expected[:101])


def test_large_scores_neither_overflow_nor_vanish() -> None:
    heads = Heads(1, 1, 16, False, torch.float32)
    q, k, v = (100 * x for x in heads.qkv(LENGTH))
    o, lse = packed(heads, [LENGTH], q, k, v)
    torch.testing.assert_close(o.double(), attend(heads.spec, q.double(), k.double(), v.double()), rtol=1e-3, atol=0.2)
    assert torch.isfinite(lse).all()


def backward(
    heads: Heads,
    lengths: Sequence[int],
    seed: int = 0,
    part: slice = slice(None),
    per_head: bool = False,
    tokens: slice = slice(None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients over some of the heads (and only these tokens) of the values that `seed` and the lengths give."""
    whole = sum(lengths)
    q, k, v = heads.qkv(whole, seed)
    grad = torch.randn(whole, heads.N, heads.H, generator=torch.Generator().manual_seed(seed + 100)).to(heads.dtype)
    kv, grouping = heads.read_by(*part.indices(heads.N)[:2])
    q, k, v, grad = q[tokens, part], k[tokens, kv], v[tokens, kv], grad[tokens, part]
    lengths = [len(q)] if tokens != slice(None) else lengths
    slopes = None if heads.spec.slopes is None else heads.spec.slopes[part].clone()
    cut = replace(heads, N=q.shape[1], K=k.shape[1])
    step_ = AttentionMetadata.packed(lengths).paged_step
    blocks = step_.num_blocks
    k_cache, v_cache = (torch.zeros(blocks, cut.K, 16 * heads.H, dtype=heads.dtype) for _ in range(2))
    lse = torch.empty(q.shape[:2])
    o = native.forward(
        step_, k_cache, v_cache, q, k, v, scale=heads.spec.scale, slopes=slopes, lse_TN=lse, grouping=grouping
    )
    return native.backward(
        AttentionMetadata.packed(lengths).starts.query_starts_S1,
        q,
        k,
        v,
        o,
        lse,
        grad,
        scale=heads.spec.scale,
        slopes=slopes,
        kv_grad_per_head=per_head,
        grouping=grouping,
    )


@every_case
def test_gradients_equal_a_float64_reference(heads: Heads) -> None:
    lengths = [70, 1, LENGTH]
    got = backward(heads, lengths)
    leaves = [x.double().requires_grad_() for x in heads.qkv(sum(lengths))]
    grad = torch.randn(sum(lengths), heads.N, heads.H, generator=torch.Generator().manual_seed(100)).to(heads.dtype)
    torch.cat([attend(heads.spec, *parts) for parts in zip(*(x.split(lengths) for x in leaves), strict=True)]).backward(
        grad.double()
    )
    for ours, leaf in zip(got, leaves, strict=True):
        assert leaf.grad is not None
        error = (ours.double() - leaf.grad).abs().max() / leaf.grad.abs().max()
        assert error < (5e-6 if heads.dtype is torch.float32 else 2e-2)


@every_case
def test_gradient_bits_depend_neither_on_neighbours_nor_threads_nor_other_heads(heads: Heads) -> None:
    lengths = [3, LENGTH, 70]
    expected = backward(heads, lengths, per_head=True)
    set_threads(2)
    assert all(same_bits(a, b) for a, b in zip(backward(heads, lengths, per_head=True), expected, strict=True))
    alone = backward(heads, lengths, per_head=True, tokens=slice(3, 3 + LENGTH))
    assert all(same_bits(a, b[3 : 3 + LENGTH]) for a, b in zip(alone, expected, strict=True))
    some = backward(heads, lengths, per_head=True, part=slice(heads.N // 2, heads.N))
    assert all(same_bits(a, b[:, heads.N // 2 :]) for a, b in zip(some, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32])
def test_a_shared_heads_gradient_is_the_sum_over_its_query_heads_in_order(dtype: torch.dtype) -> None:
    heads = Heads(5, 1, 20, True, dtype)
    summed, per_head = backward(heads, [LENGTH]), backward(heads, [LENGTH], per_head=True)
    for total, each in zip(summed[1:], per_head[1:], strict=True):
        expected = each[:, 0].clone()
        for n in range(1, 5):
            expected += each[:, n]
        assert same_bits(total[:, 0], expected)
