"""Choices that settings, models and kernels name alike. Imports no torch, so that a command line can read them fast."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from parallel.errors import ConfigError

Recompute = Literal["none", "selective", "full"]
"""Of what blocks compute, again in the backward: nothing; norms and activation functions; everything."""


BACKENDS = ("eager", "cpu", "sdpa", "flash")
"""What may compute attention."""
ONLY_ON = {"cpu": "cpu", "flash": "cuda"}


def check_backend(name: str, value: str | None, device: str | None = None) -> None:
    """ConfigError where the setting `name` is none of them that the device has; None leaves the choice."""
    fit = [each for each in BACKENDS if device is None or each not in ONLY_ON or ONLY_ON[each] == device]
    if value is not None and value not in fit:
        where = f", which does not run on {device}" if value in BACKENDS else ""
        raise ConfigError(f"{name} is {value!r}{where}; choose one of {', '.join(fit)}, or leave it out for the best")


def check_above_zero(section: str, config: object, names: Iterable[str]) -> None:
    """ConfigError where a number of a section of settings is not above 0."""
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise ConfigError(f"{section}.{name} is {value:g}; give a number above 0")


def check_recompute(value: object) -> None:
    """ConfigError where it is none of the three."""
    if value not in get_args(Recompute):
        raise ConfigError(f"recompute is {value!r}; choose one of {list(get_args(Recompute))}")


Scheme = Literal["int8", "int4"]
"""What weights are rounded to (parallel.quantisation.schemes)."""


def check_scheme(name: str, value: object) -> None:
    if value is not None and value not in get_args(Scheme):
        raise ConfigError(f"{name} is {value!r}; choose one of {list(get_args(Scheme))}, or leave it out")
