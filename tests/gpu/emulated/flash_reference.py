"""What torch's variable-length flash attention computes, in float32 on the CPU, with the kernels' rules as assertions.

Shapes: Q new tokens, C tokens of context, N heads, K key heads, H head size; causality is aligned to the ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

PAGE = 256
"""Flash attention pages multiples of this only."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, query_starts: Tensor, key_starts: Tensor, max_q: int, max_k: int,
    causal: bool = False, scale: float | None = None, window: Any = None, gqa: bool = False,
    used: Tensor | None = None, table: Tensor | None = None, num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, an unused log-sum-exp, an unused random state."""
    assert q.dtype in (torch.float16, torch.bfloat16), f"flash attention knows no {q.dtype}"
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "the last dimension is contiguous"
    assert query_starts.dtype == key_starts.dtype == torch.int32, "starts are int32"
    assert causal and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, f"head size {q.shape[-1]}, causal {causal}"
    if table is not None:
        assert k.dim() == 4 and k.shape[1] % PAGE == 0, f"pages of {k.shape[1]} tokens"
        assert table.dtype == torch.int32 and table.stride(-1) == 1, "a table is int32 and contiguous"
    assert len(q) == int(query_starts[-1]) and int(query_starts.diff().max()) <= max_q, "query starts"
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for place, own in enumerate(_ranges(query_starts)):
        if table is None:
            keys, values = (x[int(key_starts[place]) : int(key_starts[place + 1])] for x in (k, v))
        else:
            count = int(used[place] if used is not None else key_starts[place + 1] - key_starts[place])
            blocks = table[place, : -(-count // k.shape[1])].long()
            keys, values = (x[blocks].flatten(0, 1)[:count] for x in (k, v))
        assert len(keys) <= max_k, f"{len(keys)} keys, at most {max_k} announced"
        weights, wide = _weights(q[own], keys, scale), _wide(values, q.shape[1])
        out[own] = torch.einsum("nqc,cnh->qnh", weights, wide).to(q.dtype)
    return out, q.new_zeros((q.shape[1], len(q)), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, query_starts: Tensor, key_starts: Tensor,
    max_q: int, max_k: int, causal: bool, state: Tensor, scale: float | None = None, window: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads, key_heads = q.shape[1], k.shape[1]
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    for own, theirs in zip(_ranges(query_starts), _ranges(key_starts), strict=True):
        weights = _weights(q[own], k[theirs], scale)
        g, o = grad[own].float(), out[own].float()
        d_weights = torch.einsum("qnh,cnh->nqc", g, _wide(v[theirs], heads))
        d_scores = weights * (d_weights - (g * o).sum(-1).t()[:, :, None]) * scale
        dq[own] = torch.einsum("nqc,cnh->qnh", d_scores, _wide(k[theirs], heads))
        for total, part in (
            (dk, torch.einsum("nqc,qnh->cnh", d_scores, q[own].float())),
            (dv, torch.einsum("nqc,qnh->cnh", weights, g)),
        ):
            total[theirs] = part.unflatten(1, (key_heads, heads // key_heads)).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _ranges(starts: Tensor) -> Iterator[slice]:
    return (slice(start, stop) for start, stop in pairwise(starts.tolist()))


def _wide(x: Tensor, heads: int) -> Tensor:
    """Float32, a key head for every query head."""
    return x.float().repeat_interleave(heads // x.shape[1], 1)


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    new, context = len(q), len(k)
    hidden = torch.arange(context)[None] > torch.arange(context - new, context)[:, None]
    scores = torch.einsum("qnh,cnh->nqc", q.float(), _wide(k, q.shape[1])) * scale
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)
