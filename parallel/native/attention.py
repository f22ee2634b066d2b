"""Attention on CPUs: paged forward and packed backward, float32 or bfloat16 in memory and float32 inside.

A row of the result depends only on its own sequence's queries, keys and values: not on the rows beside it, chunking,
decoding or prefill, the blocks its keys happen to lie in, the thread count or the number of local heads. No autograd
here (parallel/backends/cpu.py), no choice of backend; caches must come from KVCache, whose layout this kernel reads.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.native.library import library

RUN = 16  # keys stored together, dimension by dimension; block sizes are a multiple of it
DTYPES = (torch.float32, torch.bfloat16)

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_Strides = _L * 6


class _Step(ctypes.Structure):
    """attn::Step of attention_step.h."""

    _fields_ = (
        ("sequences", _L),
        ("block_size", _L),
        ("table_stride", _L),
        ("query_starts", _P),
        ("context_lens", _P),
        ("tables", _P),
    )


class PagedStep:
    """Where the new tokens of one step stand and which blocks hold their sequences: laid out once, used by every layer.

    All int32 on the CPU: query_starts [S + 1], context_lens [S] (new tokens included), block_tables [S, blocks].
    """

    def __init__(self, query_starts: Tensor, context_lens: Tensor, block_tables: Tensor, block_size: int) -> None:
        tensors = (query_starts, context_lens, block_tables)
        if any(t.dtype is not torch.int32 or t.device.type != "cpu" for t in tensors):
            raise ConfigError(
                "the native attention step takes int32 tensors on the CPU; build it with AttentionMeta.build"
            )
        self._keep = tuple(t.contiguous() for t in tensors)  # the structure holds their addresses
        starts, lens, tables = self._keep
        self._struct = _Step(
            len(lens), block_size, tables.stride(0), starts.data_ptr(), lens.data_ptr(), tables.data_ptr()
        )
        self.address = ctypes.addressof(self._struct)
        self.num_tokens = int(starts[-1])


def forward(
    step: PagedStep,
    k_cache: Tensor,
    v_cache: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    *,
    scale: float,
    slopes: Tensor | None = None,
    lse_TN: Tensor | None = None,
    masks: int | None = None,
) -> Tensor:
    """Write the new keys and values into the cache and attend over it; the log-sum-exp goes to lse_TN where given.
    `masks` is the address of a dropout.Heads.
    """
    T, N, H = q_TNH.shape
    K = k_TKH.shape[1]
    if q_TNH.stride(2) != 1 or k_TKH.stride(2) != 1 or v_TKH.stride(2) != 1:
        q_TNH, k_TKH, v_TKH = q_TNH.contiguous(), k_TKH.contiguous(), v_TKH.contiguous()
    o_TNH = q_TNH.new_empty((T, N, H))
    if N == 0 or T == 0:
        return o_TNH
    q_strides, k_strides, v_strides = q_TNH.stride(), k_TKH.stride(), v_TKH.stride()
    strides = _Strides(q_strides[0], q_strides[1], k_strides[0], k_strides[1], v_strides[0], v_strides[1])
    _forward()(
        step.address,
        q_TNH.dtype is torch.bfloat16,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        q_TNH.data_ptr(),
        k_TKH.data_ptr(),
        v_TKH.data_ptr(),
        strides,
        o_TNH.data_ptr(),
        None if lse_TN is None else lse_TN.data_ptr(),
        N,
        K,
        H,
        scale,
        None if slopes is None else slopes.data_ptr(),
        masks,
    )
    return o_TNH


def backward(
    query_starts: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    o_TNH: Tensor,
    lse_TN: Tensor,
    grad_o_TNH: Tensor,
    *,
    scale: float,
    slopes: Tensor | None = None,
    kv_grad_per_head: bool = False,
    masks: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of packed causal attention. A shared kv head's gradients are added over its query heads in ascending
    order, or with kv_grad_per_head returned one per query head, [T, N, H]."""
    T, N, H = q_TNH.shape
    K = k_TKH.shape[1]
    inputs = [x if x.stride(2) == 1 else x.contiguous() for x in (q_TNH, k_TKH, v_TKH, o_TNH, grad_o_TNH)]
    grads = [q_TNH.new_empty((T, heads, H)) for heads in (N, *([N if kv_grad_per_head else K] * 2))]
    if N == 0 or T == 0:
        return grads[0], grads[1].zero_(), grads[2].zero_()
    strides = (_L * 16)(*(stride for x in (*inputs, *grads) for stride in x.stride()[:2]))
    pointers = (_P * 5)(*(x.data_ptr() for x in inputs)), (_P * 3)(*(x.data_ptr() for x in grads))
    _backward()(
        query_starts.data_ptr(),
        len(query_starts) - 1,
        q_TNH.dtype is torch.bfloat16,
        pointers[0],
        lse_TN.data_ptr(),
        pointers[1],
        strides,
        N,
        K,
        H,
        scale,
        None if slopes is None else slopes.data_ptr(),
        masks,
        kv_grad_per_head,
    )
    return grads[0], grads[1], grads[2]


@cache
def _forward() -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    function = library().attn_forward
    function.argtypes = (_P, _I, _P, _P, _P, _P, _P, _Strides, _P, _P, _I, _I, _I, _F, _P, _P)
    function.restype = None
    return function


@cache
def _backward() -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    function = library().attn_backward
    function.argtypes = (_P, _L, _I, _P, _P, _P, _P, _I, _I, _I, _F, _P, _P, _I)
    function.restype = None
    return function
