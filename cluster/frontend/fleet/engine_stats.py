"""The counters of several engines as those of one: numbers add up, lists follow one another.

Works on every field of EngineLoad by its kind of value, so that a new counter needs no line here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from cluster.engine.request import EngineLoad
from parallel.errors import TpError


def total(answers: Iterable[EngineLoad | TpError]) -> EngineLoad:
    """Of those that answered; raises the first error where none did."""
    given = list(answers)
    loads = [answer for answer in given if isinstance(answer, EngineLoad)]
    if len(loads) == 1:
        return loads[0]
    if not loads:
        raise next(answer for answer in given if isinstance(answer, TpError))
    values = {field.name: _joined([getattr(load, field.name) for load in loads]) for field in fields(EngineLoad)}
    return EngineLoad(**{**values, "weight_version": max(load.weight_version for load in loads)})


def _joined(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, str):
        return "; ".join(filter(None, values))
    if isinstance(first, tuple):
        return tuple(item for value in values for item in value)
    if isinstance(first, Mapping):
        keys = {key: None for value in values for key in value}
        return {key: _added([value[key] for value in values if key in value]) for key in keys}
    return sum(values)


def _added(counts: list[Any]) -> Any:
    return tuple(map(sum, zip(*counts, strict=True))) if isinstance(counts[0], tuple) else sum(counts)
