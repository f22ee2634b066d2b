"""Rotary settings as values, and how they are read from config.json under any of their names."""

from __future__ import annotations

from dataclasses import dataclass

from parallel import exact
from parallel.errors import ConfigError
from tp_decoders.files.json_fields import Fields

MOST_POSITIONS = 2**22
"""Of a context: tables of rotations are made whole."""
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
        return 1.0 if factor <= 1 else 0.1 * weight * exact.log(factor) + 1.0

    given = scaling.optional_number("attention_factor", above=0.0)
    weights = [scaling.optional_number(key) for key in ("mscale", "mscale_all_dim")]
    if given is None:
        given = growth(weights[0]) / growth(weights[1]) if weights[0] and weights[1] else growth(1.0)
    fast, slow = (scaling.optional_number(f"beta_{end}", above=0.0) for end in ("fast", "slow"))
    return Ramp(fast=fast or 32.0, slow=slow or 1.0, attention=given, whole=scaling.flag("truncate", True))
