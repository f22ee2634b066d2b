"""Layer normalisation of replicated activations; weight and bias are replicated. No collectives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel.shard import Replicated, sharded


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis; statistics in float32, row by row."""

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.shape = (size,)
        self.weight = sharded((size,), Replicated(), 0, dtype, device)
        self.bias = sharded((size,), Replicated(), 0, dtype, device) if bias else None

    def forward(self, x_TD: Tensor) -> Tensor:
        return functional.layer_norm(x_TD, self.shape, self.weight, self.bias, self.eps)
