"""A random walk over configurations: each equals its reference in logits, loss and every gradient, or is refused by a
named error before anything is computed. `make fuzz` walks further; a failure prints its seed and what it stands for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.errors import ConfigError
from tests.tp_decoders.drawn import Case, draw, hf_config, write_drawn
from tests.tp_decoders.parity import Deviation, deviation
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


def test_a_case_is_a_function_of_its_seed() -> None:
    assert draw(7) == draw(7) and len({str(draw(seed)) for seed in range(40)}) == 40
