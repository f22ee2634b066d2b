"""Rotary position embedding: cos and sin tables, and the rotation of the first part of every head.

The tables are computed once, whole, in float32 on the CPU, so that an entry has the same bits on every rank, device
and batch; each forward only picks the rows of its positions. No collectives. T tokens, N heads, H head, R rotated
elements (R <= H, in two halves).

Dynamic (NTK) scaling is defined on the sequence itself: the token at position p is rotated by the base for a sequence
of p + 1 tokens, never by the length of a batch. Generating one token at a time, transformers does the same; it
differs for a prompt longer than the original context, where transformers rotates early tokens by the prompt's length,
so that its own cached and uncached results disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.matmul.products import uses_native
from parallel.native import elementwise
from tp_decoders.files.json_fields import Fields
from tp_decoders.model.config import MOST_POSITIONS

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
EXTENDING = ("linear", "llama3", "yarn")
UNUSED_BY_THESE = ("factor", "finetuned")
"""Of the settings of a scaling."""


@dataclass(frozen=True, kw_only=True)
class Wavelengths:
    """Of the kind llama3: waves longer than the trained context / `low` are stretched by the factor, those shorter than
    it / `high` are not, and those between in part.
    """

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """Of the kind yarn (Peng et al., arXiv 2309.00071): elements that turn more than `fast` times in the trained
    context stay as they are, those that turn less than `slow` times are stretched by the factor, and those between in
    part; `attention` scales cos and sin.
    """

    fast: float
    slow: float
    attention: float
    whole: bool  # its ends are whole elements


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """`size` elements of each head are rotated; `kind` says how positions beyond the trained context are treated, which
    is `original` where max_positions counts those already.
    """

    size: int
    base: float
    max_positions: int
    kind: str = "default"
    factor: float = 1.0
    original: int | None = None
    band: Wavelengths | Ramp | None = None  # of the kinds llama3 and yarn

    @property
    def trained(self) -> int:
        """The context that the factor extends."""
        return self.original or self.max_positions

    @property
    def reach(self) -> int:
        """The longest sequence that can be computed."""
        if self.kind == "default":
            return self.max_positions
        return max(self.max_positions, int(self.trained * self.factor))


@dataclass(frozen=True, eq=False)
class Rotation:
    """What one forward needs: cos and sin of every token's angles, [T, R/2] float32 each."""

    cos: Tensor
    sin: Tensor

    @cached_property
    def _spread(self) -> dict[int, Rotation]:
        return {}

    def by_head(self, n_heads: int) -> Rotation:
        """The same with a row per token and head, [T * N, R/2]; made once per forward."""
        if n_heads not in self._spread:
            cos, sin = (table.repeat_interleave(n_heads, 0) for table in (self.cos, self.sin))
            self._spread[n_heads] = Rotation(cos, sin)
        return self._spread[n_heads]


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


def rotated(qkv_TN3H: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """q and k rotated, and v: [T, N, H] each. Without gradients q and k turn in place, in one call."""
    if torch.is_grad_enabled() and qkv_TN3H.requires_grad:
        q_TNH, k_TNH, v_TNH = qkv_TN3H.unbind(2)
        return rotate(q_TNH, rotation), rotate(k_TNH, rotation), v_TNH
    q_TNH, k_TNH, v_TNH = qkv_TN3H.unbind(2)
    n_heads = qkv_TN3H.shape[1]
    if qkv_TN3H.stride(0) == n_heads * qkv_TN3H.stride(1):  # tokens and heads are one axis of this memory
        rotate_(qkv_TN3H.flatten(0, 1)[:, :2], rotation.by_head(n_heads))
        return q_TNH, k_TNH, v_TNH
    return rotate_(q_TNH, rotation), rotate_(k_TNH, rotation), v_TNH  # flattened, it would be a copy that turns


def rotate(x_TNH: Tensor, rotation: Rotation) -> Tensor:
    """The rotated heads: in place where no gradient is wanted, a new tensor otherwise; the same bits both ways."""
    if torch.is_grad_enabled() and x_TNH.requires_grad:
        return _Rotate.apply(x_TNH, rotation)
    return rotate_(x_TNH, rotation)


def rotate_(x_TNH: Tensor, rotation: Rotation, inverse: bool = False) -> Tensor:
    """Rotates in place (back, if inverse), in float32, rounded once. The tensor may be a strided view."""
    if uses_native(x_TNH):
        return elementwise.rotary_(x_TNH, rotation.cos, rotation.sin, inverse)
    half = rotation.cos.shape[-1]
    first, second = x_TNH[..., :half].float(), x_TNH[..., half : 2 * half].float()
    cos, sin = rotation.cos[:, None], (-rotation.sin if inverse else rotation.sin)[:, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    x_TNH[..., : 2 * half].copy_(turned)
    return x_TNH


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx, x_TNH: Tensor, rotation: Rotation) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.rotation = rotation
        return rotate_(x_TNH.clone(memory_format=torch.contiguous_format), rotation)

    @staticmethod
    def backward(ctx, grad_TNH: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def,override]
        return rotate_(grad_TNH.clone(memory_format=torch.contiguous_format), ctx.rotation, inverse=True), None


NEOX_NAMES = ("rotary_pct", "partial_rotary_factor"), ("rotary_emb_base", "rope_theta")
NAMES = ("partial_rotary_factor",), ("rope_theta",)
"""Of the share of a head that turns, and of the base."""


def rotary_from_hf(
    fields: Fields,
    head_dim: int,
    max_positions: int,
    default_share: float,
    names: tuple[tuple[str, ...], tuple[str, ...]] = NEOX_NAMES,
) -> RotaryConfig:
    """Reads the rotary settings under any of their names.

    transformers 5 says all of them in rope_parameters (or in rope_scaling, which then comes first); what is not there
    is read from rotary_pct (partial_rotary_factor), rotary_emb_base (rope_theta) and rope_scaling, as before.
    """
    (share_name, *shares), (base_name, *bases) = names
    share = fields.number(share_name, default_share, within=(0.0, 1.0), aliases=tuple(shares))
    base = fields.number(base_name, 10000, above=0.0, aliases=tuple(bases))
    whole, scaling = fields.section("rope_parameters"), fields.section("rope_scaling")
    given = scaling if scaling is not None and scaling.values else whole
    if given is not None:
        share = given.number("partial_rotary_factor", share, within=(0.0, 1.0))
        base = given.number("rope_theta", base, above=0.0)
    size = int(head_dim * share)
    if size % 2:
        raise ConfigError(
            f"{fields.where}: {share_name} = {share} of heads of {head_dim} rotates {size} elements; they turn in "
            "pairs, so give a share that makes an even number"
        )
    kind, factor, original, band = _scaling_from_hf(given)
    if kind == "dynamic" and size <= 2:
        raise ConfigError(
            f"{fields.where}: dynamic rope_scaling needs more than 2 rotated elements per head, not {size}"
        )
    config = RotaryConfig(
        size=size, base=base, max_positions=max_positions, kind=kind, factor=factor, original=original, band=band
    )
    if config.trained * factor > MOST_POSITIONS:
        raise ConfigError(
            f"{fields.where}: factor {factor} makes a context of more than {MOST_POSITIONS} of {config.trained}"
        )
    return config


def _scaling_from_hf(scaling: Fields | None) -> tuple[str, float, int | None, Wavelengths | Ramp | None]:
    """The kind, its factor, where it is not max_positions the context that the factor extends, and what else it has."""
    if scaling is None:
        return "default", 1.0, None, None
    kind = scaling.take("rope_type", None, aliases=("type",)) or "default"
    if kind not in KINDS:
        raise scaling.refuse("rope_type" if "rope_type" in scaling.values else "type", ", ".join(KINDS))
    factor = 1.0 if kind == "default" else scaling.number("factor", within=(1.0, float("inf")))
    original = scaling.optional_integer("original_max_position_embeddings")
    band: Wavelengths | Ramp | None = None
    if kind == "llama3":
        low, high = (scaling.number(f"{end}_freq_factor", above=0.0) for end in ("low", "high"))
        if high <= low:
            raise scaling.refuse("high_freq_factor", f"a number above low_freq_factor = {low}")
        if original is None:
            raise ConfigError(f"{scaling.where} has no 'original_max_position_embeddings', which llama3 needs; add it")
        band = Wavelengths(low=low, high=high)
    elif kind == "yarn":
        band = _ramp_from_hf(scaling, factor)
    scaling.finish(UNUSED_BY_THESE)
    return kind, factor, original if kind in EXTENDING else None, band  # which transformers reads for these only


def _ramp_from_hf(scaling: Fields, factor: float) -> Ramp:
    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = scaling.optional_number("attention_factor", above=0.0)
    weights = [scaling.optional_number(key) for key in ("mscale", "mscale_all_dim")]
    if given is None:
        given = growth(weights[0]) / growth(weights[1]) if weights[0] and weights[1] else growth(1.0)
    fast, slow = (scaling.optional_number(f"beta_{end}", above=0.0) for end in ("fast", "slow"))
    return Ramp(fast=fast or 32.0, slow=slow or 1.0, attention=given, whole=scaling.flag("truncate", True))
