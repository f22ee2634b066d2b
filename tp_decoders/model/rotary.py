"""Rotary position embedding: tables of cos and sin.

The tables are computed once, whole, in float32 on the CPU, so that an entry has the same bits on every rank, device
and batch; each forward only picks the rows of its positions. T tokens, R rotated elements.

Dynamic (NTK) scaling is defined on the sequence itself: the token at position p is rotated by the base for a sequence
of p + 1 tokens, never by the length of a batch. Generating one token at a time, transformers does the same; it
differs for a prompt longer than the original context, where transformers rotates early tokens by the prompt's length,
so that its own cached and uncached results disagree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parallel.layers.rotary import Rotation
from tp_decoders.model.rotary_config import Ramp, RotaryConfig, Wavelengths


class Rotary:
    """The tables of one model, made at the first use on a device."""

    def __init__(self, config: RotaryConfig) -> None:
        self.config = config
        self._tables: dict[torch.device, Rotation] = {}

    def at(self, positions_T: Tensor) -> Rotation:
        device = positions_T.device
        if device not in self._tables:
            table = build_tables(self.config)
            self._tables[device] = Rotation(table.cos.to(device), table.sin.to(device))
        table = self._tables[device]
        return Rotation(table.cos[positions_T], table.sin[positions_T])


def build_tables(config: RotaryConfig) -> Rotation:
    """Angles of every position, in float32 and in the order of operations of transformers."""
    exponents = torch.arange(0, config.size, 2, dtype=torch.int64).float() / config.size
    positions = torch.arange(config.reach, dtype=torch.int64)
    if config.kind == "dynamic":
        frequencies = torch.stack([1.0 / (base**exponents) for base in _dynamic_bases(config)])
    else:
        frequencies = _stretched(config.base**exponents, config)[None]
    angles = positions.float()[:, None] * frequencies
    scale = config.band.attention if isinstance(config.band, Ramp) else 1.0
    return Rotation(angles.cos() * scale, angles.sin() * scale)


def _stretched(periods: Tensor, config: RotaryConfig) -> Tensor:
    """The frequency of each pair of elements, of its period over 2 pi."""
    factor, band = config.factor, config.band
    frequencies = 1.0 / periods
    if config.kind == "linear":
        return frequencies / factor
    if isinstance(band, Wavelengths):
        waves, trained = 2 * math.pi / frequencies, config.trained
        share = (trained / waves - band.low) / (band.high - band.low)
        between = (1 - share) * frequencies / factor + share * frequencies
        stretched = torch.where(waves > trained / band.low, frequencies / factor, frequencies)
        return torch.where((waves <= trained / band.low) & (waves >= trained / band.high), between, stretched)
    if isinstance(band, Ramp):
        first, last = (_turning(times, config) for times in (band.fast, band.slow))
        if band.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, config.size - 1)
        span = last - first if last != first else 0.001
        kept = 1 - ((torch.arange(config.size // 2, dtype=torch.float32) - first) / span).clamp(0, 1)
        return 1.0 / (factor * periods) * (1 - kept) + frequencies * kept
    return frequencies


def _turning(times: float, config: RotaryConfig) -> float:
    """The element that turns so many times in the trained context."""
    return config.size * math.log(config.trained / (times * 2 * math.pi)) / (2 * math.log(config.base))


def _dynamic_bases(config: RotaryConfig) -> list[float]:
    """The base for each position: the trained one up to the trained context, growing with the sequence beyond it."""
    factor, trained = config.factor, config.max_positions
    power = config.size / (config.size - 2)
    lengths = (max(position + 1, trained) for position in range(config.reach))
    return [config.base * ((factor * length / trained) - (factor - 1)) ** power for length in lengths]
