"""The learning rate as a pure function of the step: warm-up, then cosine, linear or constant.

The formulas are those of transformers' get_*_schedule_with_warmup, whose step is the number of optimiser steps taken
before this one: with a warm-up the first step has rate 0. Unlike there, the final rate is kept after `total_steps`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from parallel import exact
from parallel.errors import ConfigError

KINDS = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up from 0 to `learning_rate`, then down to `final_ratio` of it at `total_steps`, or constant."""

    learning_rate: float  # the highest
    kind: str = "cosine"  # constant, linear or cosine
    warmup_steps: int = 0  # linear from 0
    total_steps: int | None = None  # warm-up included; needed but for "constant"
    final_ratio: float = 0.0  # of the highest, at the end

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind {self.kind!r} is unknown; choose one of {list(KINDS)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0.0):
            raise ConfigError(f"learning_rate {self.learning_rate} is not a finite number of at least 0")
        if not 0.0 <= self.final_ratio <= 1.0:
            raise ConfigError(f"final_ratio {self.final_ratio} is not in [0, 1]; give the share of the peak to end at")
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps {self.warmup_steps} is negative; give 0 for none")
        self._check_total()

    def _check_total(self) -> None:
        if self.kind == "constant":
            if self.total_steps is not None or self.final_ratio != 0.0:
                raise ConfigError("total_steps and final_ratio mean nothing for a constant schedule; leave them out")
        elif self.total_steps is None:
            raise ConfigError(f"a {self.kind} schedule ends at total_steps; give it, or choose kind 'constant'")
        elif self.total_steps < max(1, self.warmup_steps):
            raise ConfigError(
                f"total_steps {self.total_steps} must be at least 1 and at least warmup_steps {self.warmup_steps}"
            )

    def __call__(self, step: int) -> float:
        """The learning rate of the optimiser step that is taken after `step` others."""
        if step < 0:
            raise ConfigError(f"step {step} is negative; steps are counted from 0")
        return self.learning_rate * self._factor(step)

    def _factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.total_steps is None:
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        falling = 0.5 * (1.0 + _cosine(math.pi * progress)) if self.kind == "cosine" else 1.0 - progress
        return self.final_ratio + (1.0 - self.final_ratio) * falling


def _cosine(angle: float) -> float:
    return float(exact.cos_sin(torch.tensor(angle, dtype=torch.float64))[0])
