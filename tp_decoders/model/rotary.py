"""Rotary position embedding: tables of cos and sin.

The tables are computed once, whole, in float32 on the CPU by parallel.exact, so that an entry has the same bits on
every rank, device, machine and batch; each forward only picks the rows of its positions. T tokens, R rotated elements.

Dynamic (NTK) scaling is defined on the sequence itself: the token at position p is rotated by the base for a sequence
of p + 1 tokens, never by the length of a batch. Generating one token at a time, transformers does the same; it
differs for a prompt longer than the original context, where transformers rotates early tokens by the prompt's length,
so that its own cached and uncached results disagree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parallel import exact
from parallel.layers.rotary import Rotation
from tp_decoders.model.rotary_config import Ramp, RotaryConfig, Wavelengths

AT_ONCE = 4096
"""Positions whose angles are computed together, in float64."""


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
    base = torch.tensor([config.base], dtype=torch.float64)
    frequencies = _stretched(exact.powers(base, exponents).float(), config)[None]
    scale = config.band.attention if isinstance(config.band, Ramp) else 1.0
    cos, sin = (torch.empty(config.reach, len(exponents)) for _ in range(2))
    for positions in torch.arange(config.reach, dtype=torch.int64).split(AT_ONCE):
        if config.kind == "dynamic":
            frequencies = 1.0 / exact.powers(_dynamic_bases(positions, config)[:, None], exponents).float()
        angles = exact.cos_sin(positions.float()[:, None] * frequencies)
        for table, values in zip((cos, sin), angles, strict=True):
            torch.mul(values.float(), scale, out=table[positions[0] : positions[-1] + 1])
    return Rotation(cos, sin)


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
    return config.size * exact.log(config.trained / (times * 2 * math.pi)) / (2 * exact.log(config.base))


def _dynamic_bases(positions_T: Tensor, config: RotaryConfig) -> Tensor:
    """[T] float64, the base for each position: the trained one up to the trained context, growing with the sequence
    beyond it.
    """
    factor, trained = config.factor, config.max_positions
    lengths = (positions_T + 1).clamp(min=trained).double()
    growth = factor * lengths / trained - (factor - 1)
    return config.base * exact.powers(growth, torch.tensor(config.size / (config.size - 2), dtype=torch.float64))
