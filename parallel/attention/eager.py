"""Plain torch, one sequence at a time; and the reference, softmax in float32 (float64 where the inputs are).

Any device, dtype and option; differentiable by autograd. It materialises all scores, so it is for tests and for what no
other backend can do. Its bits depend on shapes, as torch's products do.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from parallel.attention.kv_cache import KVCache, TokenCache
from parallel.attention.metadata import QKV, AttentionMetadata, AttentionSpec, Backend
from parallel.layers.dropout import HeadMasks


class BySequence(Backend):
    """One sequence at a time, keys gathered from the paged cache."""

    cache_type = TokenCache

    def attend(
        self, spec: AttentionSpec, qkv: QKV, metadata: AttentionMetadata, cache: KVCache | None, masks: HeadMasks | None
    ) -> Tensor:
        q_TNH, k_TKH, v_TKH = qkv
        assert masks is None or self.drops, "the caller asks first"
        with torch.set_grad_enabled(cache is None and torch.is_grad_enabled()):
            if cache is None:
                spec, k_TKH, v_TKH = spec.spread(k_TKH, v_TKH)
                lengths = list(metadata.query_lens)
                contexts: Iterable[tuple[Tensor, Tensor]] = zip(k_TKH.split(lengths), v_TKH.split(lengths), strict=True)
            else:
                assert isinstance(cache, TokenCache), "looked at when the step was made"
                cache.scatter(spec.layer, metadata.new_slots_T, k_TKH, v_TKH)
                slots = metadata.context_slots_C.split(metadata.context_lens)
                contexts = (cache.gather(spec.layer, own) for own in slots)
            parts = [
                self.one(spec, q_TNH[i:j], k_CKH, v_CKH, masks.factors(i, j) if masks else None)
                for (i, j), (k_CKH, v_CKH) in zip(metadata.spans, contexts, strict=True)
            ]
            return torch.cat(parts) if parts else q_TNH.new_empty(q_TNH.shape)

    @abstractmethod
    def one(
        self, spec: AttentionSpec, q_QNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, factors_NQC: Tensor | None
    ) -> Tensor:
        """The last Q tokens of one sequence against all C of it; probabilities are multiplied by the factors."""


class Eager(BySequence):
    name, drops = "eager", True

    def one(
        self, spec: AttentionSpec, q_QNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, factors_NQC: Tensor | None
    ) -> Tensor:
        return attend(spec, q_QNH, k_CKH, v_CKH, factors_NQC)


def attend(
    spec: AttentionSpec, q_QNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, factors_NQC: Tensor | None = None
) -> Tensor:
    """The last Q tokens of one sequence against all C of it; probabilities are multiplied by the factors."""
    distance_QC = distance(torch.arange(len(k_CKH), device=q_QNH.device), len(q_QNH))
    weights_NQC = probabilities(spec, q_QNH, k_CKH, distance_QC > 0, distance_QC)
    if factors_NQC is not None:
        weights_NQC = weights_NQC * factors_NQC.to(weights_NQC)
    return mixed(weights_NQC, spec.by_head(v_CKH, q_QNH.shape[1]), q_QNH)


def probabilities(
    spec: AttentionSpec,
    q_QNH: Tensor,
    k_CKH: Tensor,
    hidden_QC: Tensor | None,
    distance_QC: Tensor,
    added_NQC: Tensor | None = None,
) -> Tensor:
    """[N, Q, C] in float32 (float64 where the inputs are); `distance` is key position minus query position, `added` a
    summand of the scores.
    """
    work = torch.promote_types(q_QNH.dtype, torch.float32)
    scores_NQC = torch.einsum("qnh,cnh->nqc", q_QNH.to(work), spec.by_head(k_CKH, q_QNH.shape[1]).to(work)) * spec.scale
    if spec.slopes is not None:
        scores_NQC = scores_NQC + spec.slopes.to(work)[:, None, None] * distance_QC.to(work)
    if added_NQC is not None:
        scores_NQC = scores_NQC + added_NQC.to(work)
    if hidden_QC is not None:
        scores_NQC = scores_NQC.masked_fill(hidden_QC, float("-inf"))
    return scores_NQC.softmax(-1)


def mixed(weights_NQC: Tensor, v_CNH: Tensor, q_QNH: Tensor) -> Tensor:
    """[Q, N, H]: the values by their weights, like q in type."""
    o_QNH = torch.einsum("nqc,cnh->qnh", weights_NQC, v_CNH.to(weights_NQC.dtype))
    return o_QNH.to(q_QNH.dtype).contiguous()


def distance(places_C: Tensor, queries: int) -> Tensor:
    """[Q, C]: key place minus query place, the queries being the last."""
    return places_C[None, :] - places_C[len(places_C) - queries :, None]
