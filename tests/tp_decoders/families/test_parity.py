"""Logits, loss and every parameter's gradient against the reference: every family, option and tensor-parallel size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tp_decoders.families.parity import CASES, TOLERANCE, deviation, fast_deviation, write_reference

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


ONE_PER_FAMILY = (
    "gpt2 25 heads",
    "neox",
    "japanese 3 heads",
    "mpt query-key norm",
    "mpt multi-query",
    "bigcode",
    "qwen3",
)


@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_the_same_over_gloo_and_with_plain_sums(case: str, ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    write_reference(case, tmp_path)
    for found in ranks(3, deviation, str(tmp_path), comm="gloo"):
        assert found.beyond(TOLERANCE) == {}, "gloo"
    for size in (1, 2, 4):
        for found in ranks(size, fast_deviation, str(tmp_path)):
            assert found.beyond(TOLERANCE) == {}, f"numerics fast, tp {size}"
