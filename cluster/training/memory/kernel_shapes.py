"""Attention that computes nothing and keeps what the kernels keep: q, k, v, the output and one number per row and head.

Stands for the CPU kernel and for flash attention, whose memory does not grow with the square of the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.attention.attend import AttentionSpec
from parallel.attention.heads import KVHeads
from parallel.attention.kv_cache import RUN
from parallel.layers.dropout import HeadMasks


class ShapeAttend:
    """A pass's `attend` on the meta device. Dropout takes nothing that lasts: masks are drawn again in the backward."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def __call__(
        self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, *, masks: HeadMasks | None = None
    ) -> Tensor:
        if torch.is_grad_enabled() and q_TNH.requires_grad:
            if self._cuda and spec.kv is not None and spec.kv.sums_leaves:
                spec, k_TKH, v_TKH = spec.spread(k_TKH, v_TKH)
            result: Tensor = _Attend.apply(q_TNH, k_TKH, v_TKH, spec.kv, self._cuda)
            return result
        return torch.empty_like(q_TNH, memory_format=torch.contiguous_format)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, heads: KVHeads | None, cuda: bool) -> Tensor:
        T, N, H = q_TNH.shape
        scratch = []
        if not cuda:  # the sequences' keys and values in blocks, as the serving kernel reads them
            scratch = [q_TNH.new_empty((-(-T // RUN), k_TKH.shape[1], RUN * H)) for _ in range(2)]
        o_TNH, lse_TN = q_TNH.new_empty((T, N, H)), q_TNH.new_empty((T, N), dtype=torch.float32)
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, o_TNH, lse_TN)
        ctx.heads, ctx.cuda = heads, cuda
        del scratch
        return o_TNH

    @staticmethod
    def backward(ctx: Any, grad_o_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        wide = q.new_empty(q.shape, dtype=torch.float32) if ctx.cuda else None  # dq adds up in float32
        per_head = ctx.heads is not None and ctx.heads.sums_leaves
        dq, dk, dv = (q.new_empty(x.shape) for x in (q, *((q, q) if per_head else (k, v))))
        del wide
        if per_head:
            dk, dv = ctx.heads.grads(dk, dv)
        return dq, dk, dv, None, None
