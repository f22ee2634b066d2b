"""The padded interface against transformers: every input and output, every family, one to three ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tp_decoders.families.parity import TOLERANCE
from tests.tp_decoders.padded.padded_cases import (
    FEATURES,
    MODELS,
    ONLY,
    SIZES,
    deviation,
    reference_model,
    write_scenario,
)

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@pytest.mark.parametrize(
    ("case", "feature"), [(case, feature) for feature in FEATURES for case in ONLY.get(feature, MODELS)]
)
def test_outputs_loss_and_gradients_equal_transformers(
    case: str, feature: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    write_scenario(reference_model(case), case, FEATURES[feature](case), tmp_path)
    for size in SIZES:
        for errors in ranks(size, deviation, str(tmp_path)):
            assert not {name: e for name, e in errors.items() if not e <= TOLERANCE}, size
