"""Random walks over configurations, and over padded calls of such models: each equals its reference in outputs, loss
and every gradient, or is refused by a named error before anything is computed. `make fuzz` walks further; a failure
prints its seed and what it stands for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.errors import ConfigError, RequestError
from tests.tp_decoders.families.parity import Deviation, deviation
from tests.tp_decoders.fuzz.drawn import Case, draw, hf_config, write_drawn
from tests.tp_decoders.fuzz.drawn_calls import CAUSAL, WRONG, DrawnCall, draw_call, scenario_of, spoil
from tests.tp_decoders.fuzz.drawn_checks import call_deviation, noise_of, write_call
from tp_decoders import load
from tp_decoders.padded.padded_model import PaddedModel
from tp_decoders.padded.padded_tasks import PaddedTask
from tp_decoders.registry import config_from_hf

CASES = int(os.environ.get("FUZZ_CASES", "30"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
TOLERANCE = 1e-4
NOISE = 10.0
"""Times the distance of the reference's own float32 from its float64 (of all gradients, the worst) that is forgiven."""
KNOWN_REFUSALS = ("they turn in pairs", "needs more than 2 rotated elements")
REFUSED_AT_MOST = 0.3
"""Of all cases; else the walk would prove little."""


def outcome(case: Case, folder: Path, ranks: Any) -> dict[str, float] | str:
    """What is beyond the tolerance, or why the case is refused."""
    try:
        config_from_hf(hf_config(case))
    except ConfigError as error:
        return str(error)
    noise = write_drawn(case, folder)
    found: list[Deviation] = ranks(case.tp, deviation, str(folder))
    suspects = {name: error for each in found for name, error in each.beyond(TOLERANCE).items()}
    gradients = max(error for name, error in noise.items() if name not in ("logits", "loss"))
    return {name: error for name, error in suspects.items() if not error <= NOISE * noise.get(name, gradients)}


def known(refusal: str) -> bool:
    return any(words in refusal for words in KNOWN_REFUSALS)


@pytest.mark.timeout(60 + 10 * CASES)
def test_no_drawn_configuration_is_silently_different(ranks: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    refused, wrong = [], []
    for seed in range(FIRST, FIRST + CASES):
        case = draw(seed)
        try:
            result = outcome(case, tmp_path / str(seed), ranks)
        except Exception as error:
            raise AssertionError(f"{case}\nfailed with {type(error).__name__}: {error}") from error
        if isinstance(result, str):
            refused.append(case)
            assert known(result), f"{case}\nis refused, and should not be: {result}"
        elif result:
            wrong.append(f"{case}\n    differs: {result}")
    assert not wrong, "\n".join(wrong)
    assert len(refused) <= REFUSED_AT_MOST * CASES, f"{len(refused)} of {CASES} cases were refused"


def call_outcome(drawn: DrawnCall, folder: Path, ranks: Any) -> dict[str, float] | str:
    """What is beyond the tolerance, or why the call's model is refused."""
    try:
        config_from_hf(hf_config(drawn.model))
    except ConfigError as error:
        return str(error)
    write_call(drawn, folder)
    if drawn.wrong is not None:
        check_refusal(drawn, folder)
        return {}
    found: list[dict[str, float]] = ranks(drawn.model.tp, call_deviation, str(folder))
    suspects = {name: error for each in found for name, error in each.items() if not error <= TOLERANCE}
    if not suspects:
        return {}
    noise = noise_of(drawn)
    worst = max((error for name, error in noise.items() if name.startswith("grad")), default=0.0)
    return {name: error for name, error in suspects.items() if not error <= NOISE * noise.get(name, worst)}


def check_refusal(drawn: DrawnCall, folder: Path) -> None:
    model = load(folder, task=drawn.task)
    caller: Any = PaddedModel(model) if drawn.task == CAUSAL else PaddedTask(model)
    try:
        caller(**spoil(drawn, scenario_of(drawn).ours[-1]))
    except RequestError as error:
        assert drawn.wrong is not None and WRONG[drawn.wrong] in str(error), f"refused for another reason: {error}"
    else:
        raise AssertionError(f"{drawn.wrong} was not refused")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.timeout(60 + 10 * CASES)
def test_no_drawn_padded_call_is_silently_different(ranks: Any, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    refused, wrong = [], []
    for seed in range(FIRST, FIRST + CASES):
        drawn = draw_call(seed)
        try:
            result = call_outcome(drawn, tmp_path / str(seed), ranks)
        except Exception as error:
            raise AssertionError(f"{drawn}\nfailed with {type(error).__name__}: {error}") from error
        if isinstance(result, str):
            refused.append(drawn)
            assert known(result), f"{drawn}\nis refused, and should not be: {result}"
        elif result:
            wrong.append(f"{drawn}\n    differs: {result}")
    assert not wrong, "\n".join(wrong)
    assert len(refused) <= REFUSED_AT_MOST * CASES, f"{len(refused)} of {CASES} cases were refused"


def test_a_case_is_a_function_of_its_seed() -> None:
    assert draw(7) == draw(7) and len({str(draw(seed)) for seed in range(40)}) == 40
    assert draw_call(7) == draw_call(7) and len({str(draw_call(seed)) for seed in range(40)}) == 40
