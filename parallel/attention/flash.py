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

from parallel.attention.kv_cache import KVCache
from parallel.attention.metadata import AttentionMeta, AttentionSpec, DeviceStep, Packed
from parallel.layers.dropout import HeadMasks

PAGE = 256  # the kernels page only blocks of a multiple of this many tokens


@cache
def package() -> ModuleType | None:
    """flash_attn where it is installed; one that is installed but broken says so itself."""
    return importlib.import_module("flash_attn") if importlib.util.find_spec("flash_attn") else None


class Flash:
    name = "flash"

    drops = False

    def causal(
        self,
        spec: AttentionSpec,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        packed: Packed,
        masks: HeadMasks | None = None,
    ) -> Tensor:
        assert masks is None, "the caller asks `drops` first"
        if packed.num_tokens == 0:
            return torch.empty_like(q_TNH)
        if spec.kv is not None and (spec.kv.sums_leaves or not spec.kv.even):
            k_TKH, v_TKH = spec.kv.spread_both(k_TKH, v_TKH)
        starts, longest = packed.starts_on(q_TNH.device), max(packed.lengths)
        return _varlen(spec, q_TNH, k_TKH, v_TKH, starts, starts, longest, longest)

    @torch.no_grad()
    def cached(
        self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cache: KVCache, meta: AttentionMeta
    ) -> Tensor:
        if meta.num_tokens == 0:
            return torch.empty_like(q_TNH)
        cache.scatter(spec.layer, meta.new_slots_T, k_TKH, v_TKH)
        keys, values = cache.keys[spec.layer], cache.values[spec.layer]
        paged = meta.block_size % PAGE == 0 and (spec.kv is None or spec.kv.even)
        if not paged:
            keys, values = cache.gather(spec.layer, meta.all_context_slots)
            if spec.kv is not None and not spec.kv.even:  # the kernels know groups of one size only
                keys, values = spec.kv.spread(keys), spec.kv.spread(values)
        elif max(meta.query_lens) == 1 and package() is not None:
            return _decode(spec, q_TNH, keys, values, meta.on_device)
        longest = max(meta.query_lens), max(meta.context_lens)
        starts = meta.on_device.query_starts, meta.on_device.context_starts
        return _varlen(spec, q_TNH, keys, values, *starts, *longest, meta.on_device if paged else None)


def _decode(spec: AttentionSpec, q_TNH: Tensor, keys: Tensor, values: Tensor, step: DeviceStep) -> Tensor:
    """One new token per sequence, keys in pages; the package only."""
    flash = package()
    assert flash is not None, "asked before"
    o = flash.flash_attn_with_kvcache(
        q_TNH[:, None],
        keys,
        values,
        cache_seqlens=step.context_lens,
        block_table=step.tables,
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
    paged: DeviceStep | None = None,
) -> Tensor:
    """Causal, aligned to the end of each sequence's keys, in both libraries; with `paged`, k and v are pages."""
    flash, common = package(), (q, k, v, q_starts, k_starts, max_q, max_k)
    if flash is not None:
        table = None if paged is None else paged.tables
        return flash.flash_attn_varlen_func(
            *common, softmax_scale=spec.scale, causal=True, alibi_slopes=spec.slopes, block_table=table
        )
    from torch.nn.attention.varlen import varlen_attn  # torch's own; has no ALiBi, which choose_backend has ruled out

    pages = {} if paged is None else {"seqused_k": paged.context_lens, "block_table": paged.tables}
    shared = q.shape[1] != k.shape[-2]
    o = varlen_attn(*common, scale=spec.scale, window_size=(-1, 0), enable_gqa=shared, **pages)  # type: ignore[arg-type]
    assert isinstance(o, Tensor), "without return_aux it is the output alone"
    return o
