"""Attention over local heads, handed to the model as `attend`: `Causal` (packed sequences) or `Cached` (paged keys).

The model calls attend(spec, q_TNH, k_TKH, v_TKH) -> o_TNH and knows neither sequences nor caches nor backends. Every kv
head serves as many query heads (N / K), but for those that other ranks' query heads read, too (`spec.kv`); N may be 0
on a rank that owns no heads. The inputs may be strided views of one fused row. Collectives: in the backward the one
that adds up the gradient of kv heads that ranks share (parallel.attention.heads), none else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from parallel.attention.kv_cache import KVCache
from parallel.attention.metadata import AttentionMetadata, AttentionSpec
from parallel.attention.selector import BACKENDS, Backend, backend_named, choose_backend
from parallel.errors import ConfigError
from parallel.layers.dropout import HeadMasks

_log = logging.getLogger(__name__)

__all__ = ["BACKENDS", "AttentionMetadata", "AttentionSpec", "Backend", "Cached", "Causal", "choose_backend"]


class Causal:
    """Sequences of the given lengths packed in one flat row, causal within each; differentiable wrt q, k and v.

    Without a backend the best one for the first call's device, dtype and heads is chosen, and a name that cannot work
    with them is refused. Probabilities are dropped by the eager backend where the chosen one cannot.
    """

    def __init__(
        self, lengths: Sequence[int], backend: Backend | str | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.metadata = AttentionMetadata.packed(lengths, device)
        self.backend = backend_named(backend) if isinstance(backend, str) else backend
        self._fits = self.backend is not None and not isinstance(backend, str)  # else the first call asks

    def __call__(
        self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, *, masks: HeadMasks | None = None
    ) -> Tensor:
        _check_heads(spec, q_TNH, k_TKH, v_TKH, self.metadata.num_tokens)
        if self.backend is None or not self._fits:
            self._fits = True
            self.backend = choose_backend(
                None if self.backend is None else self.backend.name,
                q_TNH.device,
                q_TNH.dtype,
                alibi=spec.slopes is not None,
                head_dim=q_TNH.shape[2],
            )
        backend = self.backend if masks is None or self.backend.drops else _dropping_instead_of(self.backend.name)
        return backend.attend(spec, (q_TNH, k_TKH, v_TKH), self.metadata, None, masks)


@cache
def _dropping_instead_of(name: str) -> Backend:
    _log.warning("attention backend %s drops no probabilities: passes with attention dropout use eager", name)
    return backend_named("eager")


class Cached:
    """One step over a paged cache: writes the layer's new keys and values, then attends over it. Not differentiable."""

    def __init__(self, backend: Backend, cache: KVCache, metadata: AttentionMetadata) -> None:
        self.backend, self._cache, self.metadata = backend, cache, metadata
        if not isinstance(cache, backend.cache_type):
            raise ConfigError(
                f"attention backend {backend.name} over a {type(cache).__name__}, which is laid out for another; "
                "let the backend make the cache: backend.cache(layout, num_blocks)"
            )
        if metadata.block_size != cache.layout.block_size or metadata.max_block >= cache.num_blocks:
            raise ConfigError(
                f"a step with blocks of {metadata.block_size} tokens, the highest {metadata.max_block}, over a cache "
                f"of {cache.num_blocks} blocks of {cache.layout.block_size}; plan steps with the cache's own numbers"
            )

    def __call__(
        self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, *, masks: HeadMasks | None = None
    ) -> Tensor:
        assert masks is None, "serving drops nothing"
        layout, n_kv_heads = self._cache.layout, self._cache.layout.heads(spec.layer)
        _check_heads(spec, q_TNH, k_TKH, v_TKH, self.metadata.num_tokens)
        if q_TNH.shape[1] == 0:
            return q_TNH.new_empty(q_TNH.shape)
        if k_TKH.shape[1] != n_kv_heads or k_TKH.shape[2] != layout.head_dim or k_TKH.dtype is not layout.dtype:
            raise ConfigError(
                f"keys {list(k_TKH.shape)} of {k_TKH.dtype} for a cache of {n_kv_heads} heads of "
                f"{layout.head_dim} in {layout.dtype}; build the KVLayout from the model's local heads and dtype"
            )
        return self.backend.attend(spec, (q_TNH, k_TKH, v_TKH), self.metadata, self._cache, None)


def _check_heads(spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, num_tokens: int) -> None:
    q, k = q_TNH.shape, k_TKH.shape
    fits = len(q) == len(k) == 3 and k == v_TKH.shape and num_tokens == q[0] == k[0] and k[2] == q[2]
    if not fits or not _fit(spec, q[1], k[1]):
        wanted = "a divisor of q's" if spec.kv is None else spec.kv.layout.n_local_kv
        raise ConfigError(
            f"attention over q {list(q)}, k {list(k)}, v {list(v_TKH.shape)}, {num_tokens} tokens; each is "
            f"[tokens, heads, head_dim], with {wanted} heads of k and v"
        )
    if q_TNH.dtype is not k_TKH.dtype or q_TNH.dtype is not v_TKH.dtype:
        raise ConfigError(
            f"attention over q {q_TNH.dtype}, k {k_TKH.dtype} and v {v_TKH.dtype}; bring them to one dtype"
        )
    if spec.slopes is not None and (spec.slopes.shape != q[1:2] or spec.slopes.dtype is not torch.float32):
        raise ConfigError(
            f"ALiBi slopes {list(spec.slopes.shape)} of {spec.slopes.dtype} for {q[1]} local heads; one float32 each"
        )


def _fit(spec: AttentionSpec, n_heads: int, n_kv_heads: int) -> bool:
    """Whether so many query heads can read so many key/value heads."""
    if spec.kv is not None:
        return (n_heads, n_kv_heads) == (spec.kv.layout.n_local, spec.kv.layout.n_local_kv)
    return n_heads == 0 or (n_kv_heads > 0 and n_heads % n_kv_heads == 0)
