"""Learning-rate schedules against transformers' own, step for step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import optimization as hf

from cluster.training.step.lr_schedule import Schedule
from parallel.errors import ConfigError

PEAK = 3e-4


def rates_of_transformers(make: Any, steps: int, **options: Any) -> list[float]:
    """The learning rates that `steps` optimiser steps are taken with."""
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler, found = make(optimiser, **options), []
    for _ in range(steps):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("warmup", "total"), [(0, 30), (7, 30), (1, 2), (10, 10), (0, 1)])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_rates_are_those_of_transformers(kind: str, warmup: int, total: int) -> None:
    make = {"cosine": hf.get_cosine_schedule_with_warmup, "linear": hf.get_linear_schedule_with_warmup}[kind]
    expected = rates_of_transformers(make, total, num_warmup_steps=warmup, num_training_steps=total)
    schedule = Schedule(learning_rate=PEAK, kind=kind, warmup_steps=warmup, total_steps=total)
    assert [schedule(step) for step in range(total)] == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_a_cosine_that_ends_above_zero_is_that_of_transformers() -> None:
    options = {"num_warmup_steps": 5, "num_training_steps": 40, "min_lr_rate": 0.1}
    expected = rates_of_transformers(hf.get_cosine_with_min_lr_schedule_with_warmup, 40, **options)
    schedule = Schedule(learning_rate=PEAK, warmup_steps=5, total_steps=40, final_ratio=0.1)
    assert [schedule(step) for step in range(40)] == pytest.approx(expected, rel=1e-12)


def test_a_constant_rate_after_warmup_is_that_of_transformers() -> None:
    expected = rates_of_transformers(hf.get_constant_schedule_with_warmup, 20, num_warmup_steps=6)
    schedule = Schedule(learning_rate=PEAK, kind="constant", warmup_steps=6)
    assert [schedule(step) for step in range(20)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_final_rate_is_kept_after_the_end(kind: str) -> None:
    schedule = Schedule(learning_rate=PEAK, kind=kind, total_steps=10, final_ratio=0.25)
    assert [schedule(step) for step in (10, 11, 10_000)] == pytest.approx([PEAK / 4] * 3)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kind": "step"}, "kind"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"final_ratio": 1.5}, "final_ratio"),
        ({"total_steps": None}, "total_steps"),
        ({"total_steps": 0}, "total_steps"),
        ({"total_steps": 5, "warmup_steps": 6}, "total_steps"),
        ({"kind": "constant"}, "total_steps"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_by_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Schedule(**({"learning_rate": PEAK, "total_steps": 10} | options))


def test_steps_are_counted_from_zero() -> None:
    with pytest.raises(ConfigError, match="step -1 is negative"):
        Schedule(learning_rate=PEAK, kind="constant")(-1)
