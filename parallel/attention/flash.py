"""Flash attention on CUDA: the flash-attn package, or torch's own variable-length kernels where it is missing.

UNTESTED: written from the documented signatures of flash-attn 2.8 and torch 2.13; no GPU was at hand. float16 and
bfloat16 only, head_dim a multiple of 8 up to 256; ALiBi needs the package. Paged keys are read in place where
blocks are a multiple of 256 tokens (the kernels' rule) and all key/value heads have as many query heads, else gathered
first. Bits may depend on the batch.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from parallel.attention.kv_cache import KVCache, TokenCache
from parallel.attention.metadata import QKV, AttentionMetadata, AttentionSpec, Backend
from parallel.layers.dropout import HeadMasks

PAGE = 256  # the kernels page only blocks of a multiple of this many tokens


@cache
def package() -> ModuleType | None:
    """flash_attn where it is installed; one that is installed but broken says so itself."""
    return importlib.import_module("flash_attn") if importlib.util.find_spec("flash_attn") else None


class Flash(Backend):
    name, drops, cache_type = "flash", False, TokenCache

    @classmethod
    def obstacle(cls, device: torch.device, dtype: torch.dtype, alibi: bool, head_dim: int) -> str | None:
        if device.type != "cuda":
            return f"it needs a CUDA device and the device is {device}; use cpu, sdpa or eager"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it has no kernel for {dtype}; use bfloat16 or float16, or the backend sdpa"
        if head_dim > 256 or head_dim % 8:
            return f"heads are {head_dim} wide and it takes multiples of 8 up to 256; use the backend sdpa"
        if alibi and package() is None:
            instead = "install tp-decoders[cuda] or use the backend sdpa"
            return f"ALiBi needs the flash-attn package, which is missing; {instead}"
        return None

    def attend(
        self, spec: AttentionSpec, qkv: QKV, metadata: AttentionMetadata, cache: KVCache | None, masks: HeadMasks | None
    ) -> Tensor:
        q_TNH, k_TKH, v_TKH = qkv
        assert masks is None, "the caller asks `drops` first"
        if metadata.num_tokens == 0:
            return torch.empty_like(q_TNH)
        if cache is not None:
            assert isinstance(cache, TokenCache), "looked at when the step was made"
            with torch.no_grad():
                cache.scatter(spec.layer, metadata.new_slots_T, k_TKH, v_TKH)
                return _over_cache(spec, q_TNH, metadata, cache)
        if spec.kv is not None and (spec.kv.sums_leaves or not spec.kv.even):
            spec, k_TKH, v_TKH = spec.spread(k_TKH, v_TKH)
        starts, longest = metadata.starts.query_starts_S1, max(metadata.query_lens)
        return _varlen(spec, q_TNH, k_TKH, v_TKH, starts, starts, longest, longest)


def _over_cache(spec: AttentionSpec, q_TNH: Tensor, step: AttentionMetadata, cache: TokenCache) -> Tensor:
    keys, values = cache.keys[spec.layer], cache.values[spec.layer]
    paged = step.block_size % PAGE == 0 and (spec.kv is None or spec.kv.even)
    if not paged:
        keys, values = cache.gather(spec.layer, step.context_slots_C)
        if spec.kv is not None and not spec.kv.even:  # the kernels know groups of one size only
            keys, values = spec.kv.spread(keys), spec.kv.spread(values)
    elif max(step.query_lens) == 1 and package() is not None:
        return _decode(spec, q_TNH, keys, values, step)
    longest = max(step.query_lens), max(step.context_lens)
    return _varlen(spec, q_TNH, keys, values, *step.starts[:2], *longest, step if paged else None)


def _decode(spec: AttentionSpec, q_TNH: Tensor, keys: Tensor, values: Tensor, step: AttentionMetadata) -> Tensor:
    """One new token per sequence, keys in pages; the package only."""
    flash = package()
    assert flash is not None, "asked before"
    o = flash.flash_attn_with_kvcache(
        q_TNH[:, None],
        keys,
        values,
        cache_seqlens=step.starts.context_lens_S,
        block_table=step.tables_SB,
        softmax_scale=spec.scale,
        causal=True,
        alibi_slopes=spec.slopes,
    )
    return o[:, 0].contiguous()


def _varlen(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    max_q: int,
    max_k: int,
    paged: AttentionMetadata | None = None,
) -> Tensor:
    """Causal, aligned to the end of each sequence's keys, in both libraries; with `paged`, k and v are pages."""
    flash, common = package(), (q, k, v, q_starts, k_starts, max_q, max_k)
    if flash is not None:
        table = None if paged is None else paged.tables_SB
        return flash.flash_attn_varlen_func(
            *common, softmax_scale=spec.scale, causal=True, alibi_slopes=spec.slopes, block_table=table
        )
    from torch.nn.attention.varlen import varlen_attn  # torch's own; has no ALiBi, which choose_backend has ruled out

    pages = {} if paged is None else {"seqused_k": paged.starts.context_lens_S, "block_table": paged.tables_SB}
    shared = q.shape[1] != k.shape[-2]
    o = varlen_attn(*common, scale=spec.scale, window_size=(-1, 0), enable_gqa=shared, **pages)  # type: ignore[arg-type]
    assert isinstance(o, Tensor), "without return_aux it is the output alone"
    return o
