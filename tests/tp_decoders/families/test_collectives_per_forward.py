"""How many collectives one forward issues, by family: one per reduction of the formula, never more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tp_decoders.families.parity import deviation, write_reference

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

LAYERS = 2
EMBEDDING = Counter(sum=1)
TWO_PER_LAYER = EMBEDDING + Counter(tree_sum=2 * LAYERS)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("neox", EMBEDDING + Counter(tree_sum=LAYERS)),  # attention and MLP are added in one reduction
        ("neox sequential", TWO_PER_LAYER),
        ("gpt2", TWO_PER_LAYER),
        ("japanese", TWO_PER_LAYER),
        ("mpt", TWO_PER_LAYER),
        ("mpt query-key norm", TWO_PER_LAYER + Counter(all_gather=LAYERS)),
        ("bigcode", TWO_PER_LAYER),
        ("qwen3", TWO_PER_LAYER),
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_a_forward_issues_exactly_these_collectives(
    case: str, expected: Counter[str], size: int, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    write_reference(case, tmp_path)
    for found in ranks(size, deviation, str(tmp_path)):
        assert found.collectives == expected
