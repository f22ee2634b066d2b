"""Weights rounded to whole numbers, the nearest, ties to even: what `--quantize` means.

    int8    one scale per output, float32: its largest weight is 127 of them
    int4    groups of 128 inputs, a float16 scale each (as other programs' files have): numbers 0..15 around 8

Both are of whole rows: a rank that holds a part of them (of a row-parallel layer) rounds the whole and takes its part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.options import Scheme
from parallel.quantisation.numbers import Numbers

GROUP = 128
_ROWS = 1 << 22  # numbers that are rounded at once


def quantised(scheme: Scheme, weight_NK: Tensor) -> Numbers:
    """The nearest whole numbers. ConfigError for what is no matrix of finite numbers."""
    if weight_NK.dim() != 2 or not weight_NK.is_floating_point():
        raise ConfigError(f"cannot quantise {list(weight_NK.shape)} {weight_NK.dtype}; give a matrix of weights")
    return _int8(weight_NK) if scheme == "int8" else _int4(weight_NK)


def _largest(weight_NK: Tensor) -> Tensor:
    """float32 [N]: the largest absolute weight of each row."""
    if weight_NK.shape[1] == 0:
        return torch.zeros(len(weight_NK))
    found = weight_NK.abs().amax(1).float()
    if not bool(torch.isfinite(found).all()):
        raise ConfigError("a weight is infinite or NaN, for which there is no whole number; mend the checkpoint")
    return found


def _int8(weight_NK: Tensor) -> Numbers:
    scale = _largest(weight_NK) / 127
    divisor = torch.where(scale > 0, scale, torch.ones(()))
    numbers = torch.empty(weight_NK.shape, dtype=torch.int8)
    step = max(1, _ROWS // max(1, weight_NK.shape[1]))
    for i in range(0, len(weight_NK), step):
        rows = slice(i, i + step)
        numbers[rows] = (weight_NK[rows].float() / divisor[rows, None]).round_().clamp_(-127, 127).to(torch.int8)
    return Numbers(8, numbers, scale[None])


def _int4(weight_NK: Tensor) -> Numbers:
    n, k = weight_NK.shape
    groups = -(-k // GROUP)
    numbers = torch.empty(n, k, dtype=torch.int8)
    scales = torch.empty(groups, n)
    for g in range(groups):
        columns = slice(g * GROUP, min((g + 1) * GROUP, k))
        part = weight_NK[:, columns].float()
        scales[g] = (_largest(part) / 7).clamp_(max=65504).half().float()
        divisor = torch.where(scales[g] > 0, scales[g], torch.ones(()))
        numbers[:, columns] = (part / divisor[:, None]).round_().clamp_(-8, 7).add_(8).to(torch.int8)
    zeros = torch.full((groups, n), 8, dtype=torch.int8)
    return Numbers(4, numbers, scales, zeros, (torch.arange(k) // GROUP).int())
