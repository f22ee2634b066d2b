"""Logits, loss and every parameter's gradient against the reference: every family, option and tensor-parallel size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tp_decoders.parity import CASES, TOLERANCE, deviation, write_reference

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

SIZES = (1, 2, 3, 4)


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_all_gradients_equal_the_reference(
    case: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    write_reference(case, tmp_path)
    assert ranks(1, deviation, str(tmp_path), "eager")[0].beyond(TOLERANCE) == {}, "eager attention"
    for size in SIZES:
        for rank, found in enumerate(ranks(size, deviation, str(tmp_path))):
            assert found.beyond(TOLERANCE) == {}, f"tp {size}, rank {rank}"
