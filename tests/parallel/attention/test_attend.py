"""The attention seam: every backend against a dense float64 reference, both passes; choosing one; refusals."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from parallel.attention import cpu, flash, selector
from parallel.attention.attend import AttentionMetadata, AttentionSpec, Cached, Causal, choose_backend
from parallel.attention.cpu import Cpu
from parallel.attention.eager import Eager
from parallel.attention.kv_cache import KVCache, KVLayout
from parallel.attention.selector import backend_named
from parallel.errors import ConfigError, NativeUnavailable

BACKENDS = ["eager", "cpu", "sdpa"]
LENGTHS = [40, 1, 90]


@dataclass(frozen=True)
class Case:
    N: int
    K: int
    H: int
    alibi: bool

    def row(self, tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(tokens, self.N + 2 * self.K, self.H, generator=torch.Generator().manual_seed(3)).to(dtype)

    def split(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = row.split((self.N, self.K, self.K), dim=1)
        return q, k, v

    def spec(self, layer: int = 0) -> AttentionSpec:
        return AttentionSpec(
            layer, 1 / math.sqrt(self.H), 2.0 ** -torch.arange(1.0, self.N + 1) if self.alibi else None
        )

    def cache(self, backend: str, blocks: int = 24, layers: int = 2, dtype: torch.dtype = torch.float32) -> KVCache:
        layout = KVLayout(n_layers=layers, n_kv_heads=self.K, head_dim=self.H, block_size=16, dtype=dtype, device="cpu")
        return backend_named(backend).cache(layout, blocks)


CASES = [Case(4, 4, 16, False), Case(3, 3, 25, True), Case(5, 1, 20, False), Case(2, 1, 64, True)]


def dense(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One whole sequence, written from the formula alone."""
    T = len(q)
    scores = torch.einsum("inh,jnh->nij", q, k.expand(-1, q.shape[1], -1)) * spec.scale
    for n in range(q.shape[1] if spec.slopes is not None else 0):
        assert spec.slopes is not None
        scores[n] = scores[n] - float(spec.slopes[n]) * (torch.arange(T)[:, None] - torch.arange(T)[None, :])
    weights = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    return torch.einsum("nij,jnh->inh", weights, v.expand(-1, q.shape[1], -1))


def reference(case: Case, row: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.cat([dense(case.spec(), *case.split(part)) for part in row.split(list(lengths))])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_attention_and_its_gradient_equal_the_dense_formula(backend: str, case: Case) -> None:
    row = case.row(sum(LENGTHS)).requires_grad_()
    twin = row.detach().double().requires_grad_()
    weights = torch.randn(sum(LENGTHS), case.N, case.H)
    o, expected = Causal(LENGTHS, backend)(case.spec(), *case.split(row)), reference(case, twin, LENGTHS)
    assert o.is_contiguous()
    torch.testing.assert_close(o.double(), expected, rtol=0, atol=3e-6)
    o.backward(weights)
    expected.backward(weights.double())
    assert row.grad is not None and twin.grad is not None
    torch.testing.assert_close(row.grad.double(), twin.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shared_head_that_was_expanded_gets_its_gradient_per_query_head(backend: str) -> None:
    case = Case(5, 1, 20, False)
    q, k, v = case.split(case.row(sum(LENGTHS)))
    wide = [k.expand(-1, 5, -1).requires_grad_(), v.expand(-1, 5, -1).requires_grad_()]
    apart = [k.double().repeat(1, 5, 1).requires_grad_(), v.double().repeat(1, 5, 1).requires_grad_()]
    weights = torch.randn(q.shape)
    grads = torch.autograd.grad(Causal(LENGTHS, backend)(case.spec(), q, *wide), wide, weights)
    o = torch.cat([dense(case.spec(), *x) for x in zip(*(y.split(LENGTHS) for y in (q.double(), *apart)), strict=True)])
    for ours, expected in zip(grads, torch.autograd.grad(o, apart, weights.double()), strict=True):
        assert ours.shape == (sum(LENGTHS), 5, 20)
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)


def serve(case: Case, backend: str, rows: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two sequences: prefill of the first, both mixed, then decoding; layer 1 of two, blocks interleaved."""
    cache = case.cache(backend, dtype=dtype)
    tables = [[20, 3, 7, 1], [5, 2, 9, 0, 11, 4]]
    done, out = [0, 0], [[], []]  # type: tuple[list[int], list[list[Tensor]]]
    for sizes in ((30, 0), (1, 50), (19, 39), (1, 1), (1, 1)):
        live = [s for s in (0, 1) if sizes[s]]
        parts = [rows[s][done[s] : done[s] + sizes[s]] for s in live]
        for s in live:
            done[s] += sizes[s]
        meta = AttentionMetadata.build([sizes[s] for s in live], [done[s] for s in live], [tables[s] for s in live], 16)
        o = Cached(backend_named(backend), cache, meta)(case.spec(layer=1), *case.split(torch.cat(parts)))
        for s, part in zip(live, o.split([sizes[s] for s in live]), strict=True):
            out[s].append(part)
    assert not cache.keys[0].any() and not cache.values[0].any()
    return [torch.cat(parts) for parts in out]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_mix_of_prefill_chunks_and_decode_rows_over_the_cache_equals_the_dense_formula(
    backend: str, case: Case
) -> None:
    rows = case.row(52 + 91).split([52, 91])
    for o, row in zip(serve(case, backend, rows), rows, strict=True):
        torch.testing.assert_close(o.double(), reference(case, row.double(), [len(row)]), rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cpu_backend_serves_the_bits_it_trains_on(case: Case, dtype: torch.dtype) -> None:
    rows = case.row(52 + 91, dtype).split([52, 91])
    trained = Causal([91, 52], "cpu")(case.spec(), *case.split(torch.cat([rows[1], rows[0]]).requires_grad_()))
    served = serve(case, "cpu", rows, dtype)
    assert torch.equal(torch.cat([served[1], served[0]]), trained)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_without_heads_returns_nothing_of_the_right_shape(backend: str) -> None:
    q = torch.zeros(5, 0, 8)
    for kv_heads in (0, 1):
        kv = torch.zeros(5, kv_heads, 8)
        assert Causal([5], backend)(AttentionSpec(0, 1.0, torch.zeros(0)), q, kv, kv).shape == (5, 0, 8)
        cache = Case(0, kv_heads, 8, False).cache(backend)
        step = AttentionMetadata.build([5], [5], [[0]], 16)
        assert Cached(backend_named(backend), cache, step)(AttentionSpec(0, 1.0), q, kv, kv).shape == (
            5,
            0,
            8,
        )


def test_the_best_backend_on_a_cpu_is_the_kernel_and_without_a_compiler_sdpa_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_backend(None, "cpu", torch.bfloat16, alibi=True, head_dim=25).name == "cpu"

    def missing() -> None:
        raise NativeUnavailable("no compiler")

    monkeypatch.setattr(cpu, "library", missing)
    selector._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert choose_backend(None, "cpu", torch.float32, alibi=False, head_dim=64).name == "sdpa"
    assert caplog.text.count("no compiler") == 1, "once a process"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "alibi", "head_dim", "words"),
    [
        ("cpu", "cuda", torch.float32, False, 64, "CPU only"),
        ("cpu", "cpu", torch.float16, False, 64, "float16"),
        ("flash", "cpu", torch.bfloat16, False, 64, "CUDA"),
        ("flash", "cuda", torch.float32, False, 64, "float32"),
        ("flash", "cuda", torch.bfloat16, False, 20, "20 wide"),
        ("flash", "cuda", torch.bfloat16, True, 64, "flash-attn"),
        ("fast", "cpu", torch.float32, False, 64, "unknown"),
    ],
)
def test_an_impossible_backend_is_refused_with_the_reason(
    name: str, device: str, dtype: torch.dtype, alibi: bool, head_dim: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "package", lambda: None)
    with pytest.raises(ConfigError, match=words):
        choose_backend(name, device, dtype, alibi=alibi, head_dim=head_dim)


def test_on_cuda_flash_is_best_where_it_can_run_and_sdpa_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "package", lambda: None)
    assert choose_backend(None, "cuda", torch.bfloat16, alibi=False, head_dim=64).name == "flash"
    assert choose_backend(None, "cuda", torch.bfloat16, alibi=True, head_dim=64).name == "sdpa"
    assert choose_backend(None, "cuda", torch.float32, alibi=False, head_dim=64).name == "sdpa"


@pytest.mark.parametrize(
    ("queries", "contexts", "tables"),
    [([1], [17], [[0]]), ([0], [4], [[0]]), ([5], [4], [[0]]), ([1, 1], [4], [[0]]), ([1], [4], [[-1]])],
)
def test_impossible_steps_are_refused(queries: list[int], contexts: list[int], tables: list[list[int]]) -> None:
    with pytest.raises(ConfigError):
        AttentionMetadata.build(queries, contexts, tables, 16)


def test_a_step_that_does_not_fit_its_cache_is_refused_before_anything_is_written() -> None:
    cache = Case(2, 2, 8, False).cache("cpu", blocks=4)
    with pytest.raises(ConfigError, match="block"):
        Cached(Cpu(), cache, AttentionMetadata.build([1], [1], [[4]], 16))
    with pytest.raises(ConfigError, match="block"):
        Cached(Cpu(), cache, AttentionMetadata.build([1], [1], [[0]], 32))
    with pytest.raises(ConfigError, match="laid out for another"):
        Cached(Eager(), cache, AttentionMetadata.build([1], [1], [[0]], 16))


def test_inputs_of_the_wrong_shape_or_dtype_are_refused() -> None:
    q, spec = torch.zeros(3, 4, 8), AttentionSpec(0, 1.0)
    attend = Causal([3], "cpu")
    for k in (torch.zeros(3, 3, 8), torch.zeros(2, 4, 8), torch.zeros(3, 4, 9), q.bfloat16()):
        with pytest.raises(ConfigError):
            attend(spec, q, k, k)
    with pytest.raises(ConfigError, match="slopes"):
        attend(AttentionSpec(0, 1.0, torch.zeros(3)), q, q, q)
    cached = Cached(Cpu(), Case(4, 4, 16, False).cache("cpu"), AttentionMetadata.build([3], [3], [[0]], 16))
    with pytest.raises(ConfigError, match="KVLayout"):
        cached(spec, q, q, q)
    with pytest.raises(ConfigError, match="at least one"):
        Causal([3, 0])
