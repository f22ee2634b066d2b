"""Flash attention on CUDA: the flash-attn package, or torch's own variable-length kernels where it is missing.

UNTESTED: written from the documented signatures of flash-attn 2.8 and torch 2.13; no GPU was at hand. float16 and
bfloat16 only, head_dim a multiple of 8 up to 256; ALiBi needs the package. Paged keys are read in place where the
package is there and blocks are a multiple of 256 tokens (its rule), else gathered. Bits may depend on the batch.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from parallel.backends.step import AttentionMeta, AttentionSpec, Packed, int32, starts_of
from parallel.kv_cache import KVCache

PAGE = 256  # flash-attn pages only blocks of a multiple of this many tokens


@cache
def package() -> ModuleType | None:
    """flash_attn where it is installed; one that is installed but broken says so itself."""
    return importlib.import_module("flash_attn") if importlib.util.find_spec("flash_attn") else None


class Flash:
    name = "flash"

    def causal(self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, packed: Packed) -> Tensor:
        starts, longest = int32(packed.starts, q_TNH.device), max(packed.lengths)
        return _varlen(spec, q_TNH, k_TKH, v_TKH, starts, starts, longest, longest)

    @torch.no_grad()
    def cached(
        self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cache: KVCache, meta: AttentionMeta
    ) -> Tensor:
        cache.scatter(spec.layer, meta.new_slots_T, k_TKH, v_TKH)
        flash, decoding = package(), max(meta.query_lens) == 1
        if flash is not None and decoding and meta.block_size % PAGE == 0:
            o = flash.flash_attn_with_kvcache(
                q_TNH[:, None],
                cache.keys[spec.layer],
                cache.values[spec.layer],
                cache_seqlens=int32(meta.context_lens, meta.device),
                block_table=meta.tables_SB.to(meta.device),
                softmax_scale=spec.scale,
                causal=True,
                alibi_slopes=spec.slopes,
            )
            return o[:, 0].contiguous()
        starts, contexts = int32(meta.query_starts, meta.device), int32(starts_of(meta.context_lens), meta.device)
        if flash is not None and meta.block_size % PAGE == 0:
            return flash.flash_attn_varlen_func(
                q_TNH,
                cache.keys[spec.layer],
                cache.values[spec.layer],
                starts,
                contexts,
                max(meta.query_lens),
                max(meta.context_lens),
                softmax_scale=spec.scale,
                causal=True,
                alibi_slopes=spec.slopes,
                block_table=meta.tables_SB.to(meta.device),
            )
        k, v = cache.gather(spec.layer, torch.cat(meta.context_slots))
        return _varlen(spec, q_TNH, k, v, starts, contexts, max(meta.query_lens), max(meta.context_lens))


def _varlen(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, max_q: int, max_k: int
) -> Tensor:
    """Causal, aligned to the end of each sequence's keys, in both libraries."""
    flash = package()
    if flash is not None:
        return flash.flash_attn_varlen_func(
            q, k, v, q_starts, k_starts, max_q, max_k, softmax_scale=spec.scale, causal=True, alibi_slopes=spec.slopes
        )
    from torch.nn.attention.varlen import varlen_attn  # torch's own; has no ALiBi, which choose_backend has ruled out

    o = varlen_attn(
        q,
        k,
        v,
        q_starts,
        k_starts,
        max_q,
        max_k,
        scale=spec.scale,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(o, Tensor), "without return_aux it is the output alone"
    return o
