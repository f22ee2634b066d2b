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
from parallel.attention.kv_cache import KVCache, KVLayout
from parallel.attention.metadata import QKV, AttentionMetadata, AttentionSpec, Backend
from parallel.errors import NativeUnavailable
from parallel.layers.dropout import HeadMasks
from parallel.native import attention as native
from parallel.native.compiled.library import library
from parallel.native.operands import DTYPES


class RunCache(KVCache):
    """Blocks of [K, block_size / 16, 16 * H], keys transposed inside a run of sixteen; the kernel alone reads them."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        super().__init__(layout, num_blocks)
        self._paged: dict[int, native.PagedCache] = {}

    def block_shape(self, heads: int) -> tuple[int, ...]:
        return heads, self.layout.block_size // native.RUN, native.RUN * self.layout.head_dim

    def paged(self, layer: int) -> native.PagedCache:
        """A layer's blocks as the native kernel reads them."""
        known, keys, values = self._paged.get(layer), self.keys[layer], self.values[layer]
        if known is None or known.addresses != (keys.data_ptr(), values.data_ptr()):
            sizes = self.layout.heads(layer), self.layout.head_dim, self.layout.block_size
            known = self._paged[layer] = native.PagedCache(keys, values, *sizes)
        return known


class Cpu(Backend):
    name, drops, cache_type = "cpu", True, RunCache

    @classmethod
    def obstacle(cls, device: torch.device, dtype: torch.dtype, alibi: bool, head_dim: int) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU only and the device is {device}; use flash or sdpa"
        if dtype not in DTYPES:
            return f"it has no kernel for {dtype}; use float32 or bfloat16, or the backend sdpa"
        try:
            library()
        except NativeUnavailable as error:
            return f"{error} (sdpa and eager work without it; results then depend on the batch)"
        return None

    def attend(
        self, spec: AttentionSpec, qkv: QKV, metadata: AttentionMetadata, cache: KVCache | None, masks: HeadMasks | None
    ) -> Tensor:
        if cache is not None:
            assert isinstance(cache, RunCache), "looked at when the step was made"
            return native.attend(
                metadata.paged_step, cache.paged(spec.layer), *qkv, scale=spec.scale, slopes=spec.slopes,
                grouping=_grouping(spec),
            )  # fmt: skip
        if torch.is_grad_enabled() and any(x.requires_grad for x in qkv):
            return _Causal.apply(*qkv, spec, metadata, masks)  # type: ignore[no-any-return]
        return _packed(spec, qkv, metadata, None, masks)


def _grouping(spec: AttentionSpec) -> Grouping | None:
    return None if spec.kv is None else spec.kv.grouping


def _packed(
    spec: AttentionSpec, qkv: QKV, metadata: AttentionMetadata, lse_TN: Tensor | None, masks: HeadMasks | None
) -> Tensor:
    """Over a scratch cache."""
    step = metadata.paged_step
    k_cache, v_cache = (x.new_empty((step.num_blocks, x.shape[1], native.RUN * x.shape[2])) for x in qkv[1:])
    return native.forward(
        step, k_cache, v_cache, *qkv, scale=spec.scale, slopes=spec.slopes, lse_TN=lse_TN, masks=masks,
        grouping=_grouping(spec),
    )  # fmt: skip


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: AttentionSpec,
        packed: AttentionMetadata,
        masks: HeadMasks | None,
    ) -> Tensor:
        lse_TN = torch.empty(q.shape[:2], dtype=torch.float32)
        o_TNH = _packed(spec, (q, k, v), packed, lse_TN, masks)
        ctx.spec, ctx.packed, ctx.masks = spec, packed, masks
        ctx.save_for_backward(q, k, v, o_TNH, lse_TN)
        return o_TNH

    @staticmethod
    def backward(ctx: Any, grad_o_TNH: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, o, lse), heads = ctx.saved_tensors, ctx.spec.kv
        per_head = heads is not None and heads.sums_leaves
        dq, dk, dv = native.backward(
            ctx.packed.starts.query_starts_S1, q, k, v, o, lse, grad_o_TNH, scale=ctx.spec.scale,
            slopes=ctx.spec.slopes, kv_grad_per_head=per_head, masks=ctx.masks, grouping=_grouping(ctx.spec),
        )  # fmt: skip
        if per_head:
            dk, dv = heads.grads(dk, dv)
        return dq, dk, dv, None, None, None
