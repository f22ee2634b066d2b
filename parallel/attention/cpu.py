"""The C++ kernel: the same bits in training, prefill, decoding, any chunking, batch, block placement and thread count.

Packed sequences go through a scratch cache and the very kernel that serves, which keeps the log-sum-exp; the backward
recomputes the probabilities from it. A kv head that several query heads read gets the sum of their gradients: from the
kernel, in ascending order, or where the heads' leaves are added in the tree from `KVHeads.grads`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.attention.heads import Grouping
from parallel.attention.kv_cache import KVCache
from parallel.attention.metadata import AttentionMeta, AttentionSpec, Packed
from parallel.layers.dropout import HeadMasks
from parallel.native import attention as native


class Cpu:
    name = "cpu"

    drops = True

    def causal(
        self,
        spec: AttentionSpec,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        packed: Packed,
        masks: HeadMasks | None = None,
    ) -> Tensor:
        if torch.is_grad_enabled() and (q_TNH.requires_grad or k_TKH.requires_grad or v_TKH.requires_grad):
            return _Causal.apply(q_TNH, k_TKH, v_TKH, spec, packed, masks)
        return _attend(spec, q_TNH, k_TKH, v_TKH, packed, None, masks)

    def cached(
        self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cache: KVCache, meta: AttentionMeta
    ) -> Tensor:
        return native.attend(
            meta.paged_step, cache.paged(spec.layer), q_TNH, k_TKH, v_TKH, scale=spec.scale, slopes=spec.slopes,
            grouping=_grouping(spec),
        )  # fmt: skip


def _grouping(spec: AttentionSpec) -> Grouping | None:
    return None if spec.kv is None else spec.kv.grouping


def _attend(
    spec: AttentionSpec,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    packed: Packed,
    lse_TN: Tensor | None,
    masks: HeadMasks | None,
) -> Tensor:
    step, blocks = packed.scratch_step
    k_cache, v_cache = (q_TNH.new_empty((blocks, x.shape[1], native.RUN * x.shape[2])) for x in (k_TKH, v_TKH))
    return native.forward(
        step,
        k_cache,
        v_cache,
        q_TNH,
        k_TKH,
        v_TKH,
        scale=spec.scale,
        slopes=spec.slopes,
        lse_TN=lse_TN,
        masks=masks,
        grouping=_grouping(spec),
    )


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        spec: AttentionSpec,
        packed: Packed,
        masks: HeadMasks | None,
    ) -> Tensor:
        lse_TN = torch.empty(q_TNH.shape[:2], dtype=torch.float32)
        o_TNH = _attend(spec, q_TNH, k_TKH, v_TKH, packed, lse_TN, masks)
        ctx.spec, ctx.packed, ctx.masks = spec, packed, masks
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, o_TNH, lse_TN)
        return o_TNH

    @staticmethod
    def backward(ctx: Any, grad_o_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        heads = ctx.spec.kv
        per_head = heads is not None and heads.sums_leaves
        dq, dk, dv = native.backward(
            ctx.packed.starts_S1,
            q,
            k,
            v,
            o,
            lse,
            grad_o_TNH,
            scale=ctx.spec.scale,
            slopes=ctx.spec.slopes,
            kv_grad_per_head=per_head,
            masks=ctx.masks,
            grouping=_grouping(ctx.spec),
        )
        if per_head:
            dk, dv = heads.grads(dk, dv)
        return dq, dk, dv, None, None, None
