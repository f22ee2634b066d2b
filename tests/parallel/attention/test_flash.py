"""The flash backend's calls, against stand-ins with the documented signatures; the kernels themselves need CUDA."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from parallel.attention import flash
from parallel.attention.attend import AttentionMetadata, AttentionSpec, Cached, Causal
from parallel.attention.eager import Eager, attend
from parallel.attention.flash import Flash
from parallel.attention.kv_cache import KVLayout

N, K, H = 4, 1, 16
SPEC = AttentionSpec(0, 0.25, 2.0 ** -torch.arange(1.0, N + 1))
PLAIN = AttentionSpec(0, 0.25)


def from_pages(pages: Tensor, table: Tensor, length: int) -> Tensor:
    return torch.cat([pages[block] for block in table.tolist()])[:length]


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert causal and softmax_scale is not None and cu_seqlens_q.dtype is cu_seqlens_k.dtype is torch.int32
    queries, contexts = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max_seqlen_q, max_seqlen_k) == (max(queries), max(contexts))
    if block_table is None:
        keys, values = k.split(contexts), v.split(contexts)
    else:
        assert k.shape[1] % 256 == 0 and block_table.dtype is torch.int32
        keys, values = ([from_pages(x, t, c) for t, c in zip(block_table, contexts, strict=True)] for x in (k, v))  # type: ignore[assignment]
    spec = AttentionSpec(0, softmax_scale, alibi_slopes)
    return torch.cat([attend(spec, *parts) for parts in zip(q.split(queries), keys, values, strict=True)])


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, num_splits: int = 0,
) -> Tensor:  # fmt: skip
    assert k is None and v is None and causal and softmax_scale is not None
    assert cache_seqlens is not None and block_table is not None and k_cache.shape[1] % 256 == 0
    assert cache_seqlens.dtype is block_table.dtype is torch.int32
    spec = AttentionSpec(0, softmax_scale, alibi_slopes)
    rows = [
        attend(spec, q[s], from_pages(k_cache, block_table[s], length), from_pages(v_cache, block_table[s], length))
        for s, length in enumerate(cache_seqlens.tolist())
    ]
    return torch.stack(rows)


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: None = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False, seqused_k: Tensor | None = None, block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[2 if block_table is not None else 1])
    assert (seqused_k is None) == (block_table is None)
    assert seqused_k is None or seqused_k.tolist() == cu_seq_k.diff().tolist()
    return flash_attn_varlen_func(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale, causal=True, block_table=block_table
    )


@pytest.fixture(params=["package", "torch"])
def spec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AttentionSpec:
    """Stand-ins for the package (with ALiBi), or for torch's own kernel alone (without)."""
    package = SimpleNamespace(
        flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=flash_attn_with_kvcache
    )
    monkeypatch.setattr(flash, "package", lambda: package if request.param == "package" else None)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    return SPEC if request.param == "package" else PLAIN


def qkv(tokens: int) -> tuple[Tensor, ...]:
    return torch.randn(tokens, N + 2 * K, H, generator=torch.Generator().manual_seed(0)).split((N, K, K), dim=1)


def test_packed_sequences_reach_the_library_apart(spec: AttentionSpec) -> None:
    values = qkv(50)
    expected = Causal([20, 1, 29], "eager")(spec, *values)
    torch.testing.assert_close(Causal([20, 1, 29], Flash())(spec, *values), expected)


@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("steps", [[(30, 5), (1, 1)], [(3, 300), (1, 17), (40, 1)]])
def test_cached_steps_equal_the_reference_in_pages_large_and_small(
    spec: AttentionSpec, block_size: int, steps: list[tuple[int, int]]
) -> None:
    blocks = 2 * -(-400 // block_size)
    tables = [list(range(blocks - 1, blocks // 2 - 1, -1)), list(range(blocks // 2))]
    layout = KVLayout(n_layers=1, n_kv_heads=K, head_dim=H, block_size=block_size, dtype=torch.float32, device="cpu")
    backends = Flash(), Eager()
    caches = [backend.cache(layout, blocks) for backend in backends]
    done = [0, 0]
    for sizes in steps:
        done = [d + n for d, n in zip(done, sizes, strict=True)]
        meta, values = AttentionMetadata.build(sizes, done, tables, block_size), qkv(sum(sizes))
        ours, reference = (Cached(*own, meta)(spec, *values) for own in zip(backends, caches, strict=True))
        torch.testing.assert_close(ours, reference)
        assert ours.is_contiguous()
