"""Attention on CPUs: paged forward and packed backward, float32 or bfloat16 in memory and float32 inside.

A row of the result depends only on its own sequence's queries, keys and values: not on the rows beside it, chunking,
decoding or prefill, the blocks its keys happen to lie in, the thread count or the number of local heads. No autograd
here (parallel/attention/cpu.py), no choice of backend; caches must come from KVCache, whose layout this kernel reads.
"""

import ctypes
import math
import struct
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.native.compiled.library import entry
from parallel.native.operands import checked, number, refused, succeeded, words, written

RUN = 16  # keys stored together, dimension by dimension; block sizes are a multiple of it

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_FORWARD = struct.Struct("23qd")  # AttentionForward of attention.cpp


class _Step(ctypes.Structure):
    """attn::Step of attention_step.h."""

    _fields_ = (
        ("sequences", _L),
        ("block_size", _L),
        ("table_stride", _L),
        ("table_width", _L),
        ("query_starts", _P),
        ("context_lens", _P),
        ("tables", _P),
        ("tokens", _L),
        ("blocks", _L),
    )


class Masks(Protocol):
    """Which probabilities are dropped (dropout.Heads): a key of every token and of every local head, int64."""

    tokens_T: Tensor
    heads_N: Tensor

    @property
    def address(self) -> int: ...


class PagedStep:
    """Where the new tokens of one step stand and which blocks hold their sequences: laid out once, used by every layer.

    All int32 on the CPU: query_starts [S + 1], context_lens [S] (new tokens included), block_tables [S, blocks].
    """

    def __init__(self, query_starts: Tensor, context_lens: Tensor, block_tables: Tensor, block_size: int) -> None:
        if context_lens.dim() != 1 or block_tables.dim() != 2:
            raise ConfigError(
                f"an attention step of context_lens {words(context_lens)} and block_tables {words(block_tables)}; they "
                "are [sequences] and [sequences, blocks]: build it with AttentionMetadata.build"
            )
        S, width = len(context_lens), block_tables.shape[1]
        starts = checked("attention step", "query_starts", query_starts, (S + 1,), torch.int32)
        lens = checked("attention step", "context_lens", context_lens, (S,), torch.int32)
        tables = checked("attention step", "block_tables", block_tables, (S, width), torch.int32)
        self._keep = (starts, lens, tables)  # the structure holds their addresses
        addresses = starts.data_ptr(), lens.data_ptr(), tables.data_ptr()
        self._struct = _Step(S, block_size, width, width, *addresses, -1, -1)
        self.address = ctypes.addressof(self._struct)
        succeeded("attention step", _check_step()(self.address))
        self.num_tokens, self.num_blocks, self.block_size = self._struct.tokens, self._struct.blocks, block_size

    def follow(self, other: "PagedStep") -> None:
        """Becomes the same step as the other, of as many tokens, at the address that it has."""
        if other.num_tokens != self.num_tokens or other.block_size != self.block_size:
            raise ConfigError(
                f"a step of {other.num_tokens} tokens in blocks of {other.block_size} cannot stand where one of "
                f"{self.num_tokens} in blocks of {self.block_size} was recorded"
            )
        ctypes.memmove(self.address, other.address, ctypes.sizeof(_Step))
        self._keep, self.num_blocks = other._keep, other.num_blocks


class PagedCache:
    """Where one layer's keys and values lie, as the kernel reads them: checked once, used by every step.

    Both [blocks, kv heads, block_size / 16, 16 * head_dim], contiguous and of one type (parallel.attention.kv_cache).
    """

    def __init__(self, k_cache: Tensor, v_cache: Tensor, kv_heads: int, head_dim: int, block_size: int) -> None:
        shape = (k_cache.shape[0] if k_cache.dim() else 0, kv_heads, block_size // RUN, RUN * head_dim)
        self.dtype = k_cache.dtype
        for name, cache_ in (("k_cache", k_cache), ("v_cache", v_cache)):
            number("attention", name, cache_)
            if cache_.numel() != math.prod(shape):
                raise refused("attention", name, words(cache_), f"it must be {list(shape)}; build it with KVCache")
            written("attention", name, cache_, cache_.shape, self.dtype)
        self._keep = k_cache, v_cache
        self.addresses = k_cache.data_ptr(), v_cache.data_ptr()
        self.blocks, self.kv_heads, self.head_dim, self.block_size = shape[0], kv_heads, head_dim, block_size


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
    masks: Masks | None = None,
    grouping: tuple[int, int] | None = None,
) -> Tensor:
    """`attend` over caches that nobody has checked yet."""
    if k_TKH.dim() != 3 or q_TNH.numel() == 0 or k_TKH.shape[1] == 0:
        return attend(step, None, q_TNH, k_TKH, v_TKH, scale=scale, grouping=grouping)
    cache_ = PagedCache(k_cache, v_cache, k_TKH.shape[1], k_TKH.shape[2], step.block_size)
    return attend(
        step, cache_, q_TNH, k_TKH, v_TKH, scale=scale, slopes=slopes, lse_TN=lse_TN, masks=masks, grouping=grouping
    )


def attend(
    step: PagedStep,
    cached: PagedCache | None,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    *,
    scale: float,
    slopes: Tensor | None = None,
    lse_TN: Tensor | None = None,
    masks: Masks | None = None,
    grouping: tuple[int, int] | None = None,
) -> Tensor:
    """Write the new keys and values into the cache and attend over it; the log-sum-exp goes to lse_TN where given.
    Without heads or tokens there need be no cache. `grouping` (size, skip): query head h reads kv head (h + skip) /
    size; N / K and 0 unless given.
    """
    dtype = number("attention", "q", q_TNH)
    (T, N, H, K), (size, skip) = _shapes("attention", q_TNH, k_TKH, v_TKH, grouping)
    o_TNH = torch.empty((T, N, H), dtype=q_TNH.dtype)
    if N == 0 or T == 0:
        return o_TNH
    if cached is None or step.num_tokens != T or step.num_blocks > cached.blocks:
        raise ConfigError(
            f"attention: {T} rows of queries in a step of {step.num_tokens} tokens over block {step.num_blocks - 1} of "
            f"a cache of {cached.blocks if cached else 0}; one row for each token, and blocks that there are"
        )
    if (
        cached.kv_heads != K
        or cached.head_dim != H
        or cached.dtype is not q_TNH.dtype
        or cached.block_size != step.block_size
    ):
        raise refused("attention", "k", words(k_TKH), _cache_rule(cached, step))
    if lse_TN is not None:
        written("attention", "lse", lse_TN, (T, N), torch.float32)
    slopes_at = masks_at = 0
    if slopes is not None:
        slopes = checked("attention", "slopes", slopes, (N,), torch.float32)
        slopes_at = slopes.data_ptr()
    if masks is not None:
        masks_at = _masks("attention", masks, T, N)
    q_token, q_head, q_within = q_TNH.stride()
    k_token, k_head, k_within = k_TKH.stride()
    v_token, v_head, v_within = v_TKH.stride()
    if q_within != 1 or k_within != 1 or v_within != 1:
        q_TNH, k_TKH, v_TKH = q_TNH.contiguous(), k_TKH.contiguous(), v_TKH.contiguous()
        (q_token, q_head), (k_token, k_head), (v_token, v_head) = (x.stride()[:2] for x in (q_TNH, k_TKH, v_TKH))
    given = _FORWARD.pack(
        step.address, dtype, cached.blocks, *cached.addresses, q_TNH.data_ptr(), k_TKH.data_ptr(), v_TKH.data_ptr(),
        q_token, q_head, k_token, k_head, v_token, v_head, o_TNH.data_ptr(), 0 if lse_TN is None else lse_TN.data_ptr(),
        N, K, H, size, skip, slopes_at, masks_at, scale,
    )  # fmt: skip
    status = _forward()(given)
    if status:
        succeeded("attention", status)
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
    masks: Masks | None = None,
    grouping: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of packed causal attention. A shared kv head's gradients are added over its query heads in ascending
    order, or with kv_grad_per_head returned one per query head, [T, N, H]. `grouping` as in `attend`."""
    name = "attention backward"
    dtype = number(name, "q", q_TNH)
    (T, N, H, K), (size, skip) = _shapes(name, q_TNH, k_TKH, v_TKH, grouping)
    for operand, x in (("o", o_TNH), ("grad_o", grad_o_TNH)):
        number(name, operand, x)
        if x.shape != q_TNH.shape or x.dtype is not q_TNH.dtype:
            raise refused(name, operand, words(x), f"it must match q, {words(q_TNH)}")
    inputs = [_rows(x) for x in (q_TNH, k_TKH, v_TKH, o_TNH, grad_o_TNH)]
    grads = [torch.empty((T, heads, H), dtype=q_TNH.dtype) for heads in (N, *([N if kv_grad_per_head else K] * 2))]
    if N == 0 or T == 0:
        return grads[0], grads[1].zero_(), grads[2].zero_()
    starts = checked(name, "query_starts", query_starts, (query_starts.numel(),), torch.int32)
    lse_TN = checked(name, "lse", lse_TN, (T, N), torch.float32)
    slopes = None if slopes is None else checked(name, "slopes", slopes, (N,), torch.float32)
    masked = None if masks is None else _masks(name, masks, T, N)
    strides = (_L * 16)(*(s for _, pair in inputs for s in pair), *(s for x in grads for s in x.stride()[:2]))
    pointers = (_P * 5)(*(x.data_ptr() for x, _ in inputs)), (_P * 3)(*(x.data_ptr() for x in grads))
    status = _backward()(
        starts.data_ptr(), len(starts) - 1, T, dtype, pointers[0], lse_TN.data_ptr(), pointers[1], strides, N, K, H,
        scale, _address(slopes), masked, kv_grad_per_head, size, skip,
    )  # fmt: skip
    succeeded(name, status)
    return grads[0], grads[1], grads[2]


Rows = tuple[Tensor, tuple[int, int]]
"""A [T, heads, H] tensor whose heads are contiguous, and its token and head strides."""


def _shapes(
    operation: str, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, grouping: tuple[int, int] | None
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """T, N, H and the number of kv heads, of operands that fit together, and how these are grouped; q was looked at."""
    k_shape = k_TKH.shape
    if q_TNH.dim() == 3 and len(k_shape) == 3 and v_TKH.shape == k_shape:
        T, N, H = q_TNH.shape
        K = k_shape[1]
        if grouping is None:
            grouping = (N // K if K and N % K == 0 else 0), 0
        size, skip = grouping
        if k_shape[0] == T and k_shape[2] == H and (N == 0 or (size > skip >= 0 and -(-(N + skip) // size) == K)):
            if k_TKH.dtype is not q_TNH.dtype or v_TKH.dtype is not q_TNH.dtype:
                rule = f"keys and values must be of q's type, {q_TNH.dtype}"
                raise refused(operation, "k or v", f"{words(k_TKH)} and {words(v_TKH)}", rule)
            number(operation, "k", k_TKH)
            number(operation, "v", v_TKH)
            return (T, N, H, K), grouping
    groups = (
        "K a divisor of N" if grouping is None or not grouping[0] else f"K = ceil((N + {grouping[1]}) / {grouping[0]})"
    )
    rule = f"q is [T, N, H], k and v are [T, K, H] with {groups}; q is {words(q_TNH)}"
    raise refused(operation, "k or v", f"{words(k_TKH)} and {words(v_TKH)}", rule)


def _rows(x_TNH: Tensor) -> Rows:
    token, head, within = x_TNH.stride()
    if within == 1:
        return x_TNH, (token, head)
    x_TNH = x_TNH.contiguous()
    return x_TNH, (x_TNH.stride()[0], x_TNH.stride()[1])


def _masks(operation: str, masks: Masks, T: int, N: int) -> int:
    """The address of the masks, whose keys are what the kernel reads there."""
    for name, keys, length in (("masks.tokens", masks.tokens_T, T), ("masks.heads", masks.heads_N, N)):
        if checked(operation, name, keys, (length,), torch.int64) is not keys:
            raise refused(operation, name, words(keys), "it must be contiguous")
    return masks.address


def _cache_rule(cached: PagedCache, step: PagedStep) -> str:
    return (
        f"the cache holds {cached.kv_heads} kv heads of {cached.head_dim} of {cached.dtype} in blocks of "
        f"{cached.block_size}, the step has blocks of {step.block_size}; build it with KVCache from the model's heads"
    )


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


@cache
def _check_step() -> Callable[..., int]:
    return entry("attn_check_step", (_P,), _I)


@cache
def _forward() -> Callable[..., int]:
    return entry("attn_forward", (ctypes.c_char_p,), _I)


@cache
def _backward() -> Callable[..., int]:
    return entry("attn_backward", (_P, _L, _L, _I, _P, _P, _P, _P, _I, _I, _I, _F, _P, _P, _I, _I, _I), _I)
