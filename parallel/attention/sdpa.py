"""torch's scaled_dot_product_attention, one sequence at a time, keys gathered from the paged cache.

Any device; ALiBi goes in as a bias, a cached prefix as a mask. Its bits depend on shapes: on CPUs a row decoded alone
differs from the same row in a prefill (about 3e-7).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.attention.eager import BySequence, distance
from parallel.attention.metadata import AttentionSpec


class Sdpa(BySequence):
    name, drops = "sdpa", False

    def one(
        self, spec: AttentionSpec, q_QNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, factors_NQC: Tensor | None
    ) -> Tensor:
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
        q, k, v = (
            x.transpose(0, 1)[None] for x in (q_QNH, *(spec.by_head(kv, q_QNH.shape[1]) for kv in (k_CKH, v_CKH)))
        )
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and queries > 1, scale=spec.scale
        )
        return o[0].transpose(0, 1).contiguous()
