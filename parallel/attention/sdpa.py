"""torch's scaled_dot_product_attention, one sequence at a time, keys gathered from the paged cache.

Any device; ALiBi goes in as a bias, a cached prefix as a mask. Its bits depend on shapes: on CPUs a row decoded alone
differs from the same row in a prefill (about 3e-7).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.attention.eager import distance
from parallel.attention.kv_cache import KVCache
from parallel.attention.metadata import AttentionMeta, AttentionSpec, Packed
from parallel.layers.dropout import HeadMasks


class Sdpa:
    name = "sdpa"

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
        if spec.kv is not None:
            k_TKH, v_TKH = spec.kv.spread_both(k_TKH, v_TKH)
            spec = replace(spec, kv=None)
        parts = [
            _attend(spec, q, k, v)
            for q, k, v in zip(*(x.split(packed.lengths) for x in (q_TNH, k_TKH, v_TKH)), strict=True)
        ]
        return torch.cat(parts) if parts else q_TNH.new_empty(q_TNH.shape)

    @torch.no_grad()
    def cached(
        self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cache: KVCache, meta: AttentionMeta
    ) -> Tensor:
        cache.scatter(spec.layer, meta.new_slots_T, k_TKH, v_TKH)
        parts = [
            _attend(spec, q, *cache.gather(spec.layer, slots))
            for q, slots in zip(q_TNH.split(meta.query_lens), meta.context_slots, strict=True)
        ]
        return torch.cat(parts) if parts else q_TNH.new_empty(q_TNH.shape)


def _attend(spec: AttentionSpec, q_QNH: Tensor, k_CKH: Tensor, v_CKH: Tensor) -> Tensor:
    """The last Q tokens of one sequence against all C of it."""
    if q_QNH.shape[1] == 0:
        return torch.empty_like(q_QNH)
    queries, context = len(q_QNH), len(k_CKH)
    mask = None
    if spec.slopes is not None:
        distance_QC = distance(torch.arange(context, device=q_QNH.device), queries)
        bias_NQC = spec.slopes[:, None, None] * distance_QC.to(spec.slopes.dtype)
        mask = bias_NQC.masked_fill(distance_QC > 0, float("-inf")).to(q_QNH.dtype)[None]
    elif 1 < queries < context:
        mask = distance(torch.arange(context, device=q_QNH.device), queries) <= 0
    q, k, v = (x.transpose(0, 1)[None] for x in (q_QNH, *(spec.by_head(kv, q_QNH.shape[1]) for kv in (k_CKH, v_CKH))))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and queries > 1, scale=spec.scale
    )
    return o[0].transpose(0, 1).contiguous()
