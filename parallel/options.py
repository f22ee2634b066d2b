"""Choices that settings, models and kernels name alike. Imports no torch, so that a command line can read them fast."""

from __future__ import annotations

from typing import Literal, get_args

from parallel.errors import ConfigError

Recompute = Literal["none", "selective", "full"]
"""Of what blocks compute, again in the backward: nothing; norms and activation functions; everything."""


def check_recompute(value: object) -> None:
    """ConfigError where it is none of the three."""
    if value not in get_args(Recompute):
        raise ConfigError(f"recompute is {value!r}; choose one of {list(get_args(Recompute))}")
