"""Attention written out: causal over packed sequences, ALiBi, shared K/V head; differentiable, knows no backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.attention import AttentionSpec


@dataclass(frozen=True)
class Dense:
    """An `attend` for sequences of these lengths, one after another."""

    lengths: Sequence[int]

    def __call__(self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        parts = zip(*(x.split(list(self.lengths)) for x in (q_TNH, k_TKH, v_TKH)), strict=True)
        return torch.cat([self.one(spec, *part) for part in parts])

    def one(self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        k_TNH, v_TNH = (x.expand(-1, q_TNH.shape[1], -1) for x in (k_TKH, v_TKH))
        scores = torch.einsum("qnh,knh->nqk", q_TNH.float(), k_TNH.float()) * spec.scale
        steps = torch.arange(len(q_TNH))
        if spec.slopes is not None:
            scores = scores + spec.slopes[:, None, None] * (steps[None, :] - steps[:, None])
        scores = scores.masked_fill(steps[None, :] > steps[:, None], float("-inf"))
        return torch.einsum("nqk,knh->qnh", scores.softmax(-1), v_TNH.float()).to(q_TNH.dtype)
