"""An adapter's shape, as a value: rank, scale, dropout, and the layers it stands beside."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from parallel.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """An adapter's shape. `targets`: names or ends of names, "all-linear" (all but the head), or a regular expression
    for whole names if it is one string; None: the projection to q, k and v. The patterns give single layers another
    rank or alpha, as PEFT's do.
    """

    rank: int = 8  # of an adapter
    alpha: float = 8.0  # the adapter is scaled by alpha / rank
    dropout: float = 0.0  # of the adapter's input
    rslora: bool = False  # scaled by alpha / sqrt(rank) in place of alpha / rank (arXiv 2312.03732)
    targets: tuple[str, ...] | str | None = None  # names of layers, or all-linear
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # other ranks by layer
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)  # other alphas by layer

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise ConfigError(f"lora rank {rank}; give at least 1")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not (math.isfinite(alpha) and alpha > 0):
                raise ConfigError(f"lora alpha {alpha}; give a finite number above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora dropout {self.dropout} is outside [0, 1); give the share of elements to drop")
        if self.targets is not None and not self.targets:
            raise ConfigError("lora targets is empty; name layers, or leave it out for the projection to q, k and v")

    def rank_of(self, theirs: str) -> int:
        """The rank at a module of the checkpoint."""
        return int(_patterned(self.rank_pattern, theirs, self.rank))

    def scale_of(self, theirs: str, rank: int) -> float:
        """What the branch at a module is multiplied by."""
        return _patterned(self.alpha_pattern, theirs, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _patterned(patterns: Mapping[str, float], name: str, otherwise: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)
