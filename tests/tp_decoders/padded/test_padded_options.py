"""Options of the families in padded calls that look into attention, whole and cached: the reference's logits still."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.ranks.group import Group
from tests.tp_decoders.families.parity import CASES, LENGTHS, TOLERANCE, error, write_reference
from tests.tp_decoders.padded.padded_cases import WATCHED
from tp_decoders import load
from tp_decoders.padded.padded_model import PaddedModel

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

OPTIONS = [case for case in CASES if "vocabulary" not in case and "mlp" not in case]
TIME, CUT = max(LENGTHS), 3


def batch(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's sequences padded on the left."""
    ids, mask = torch.zeros(len(LENGTHS), TIME, dtype=torch.long), torch.zeros(len(LENGTHS), TIME, dtype=torch.long)
    for row, part in enumerate(tokens.split(LENGTHS)):
        ids[row, TIME - len(part) :], mask[row, TIME - len(part) :] = part, 1
    return ids, mask


def deviations(group: Group, folder: str) -> dict[str, float]:
    reference = torch.load(Path(folder) / "reference.pt")
    model = load(folder, group=group)
    padded, (ids, mask), expected = PaddedModel(model), batch(reference["tokens"]), reference["logits"]
    whole = padded(ids, attention_mask=mask, **WATCHED)
    first = padded(ids[:, :CUT], attention_mask=mask[:, :CUT], use_cache=True)
    rest = padded(ids[:, CUT:], attention_mask=mask, past_key_values=first.past_key_values, **WATCHED)
    behind = torch.cat([first.logits, rest.logits], 1)
    assert whole.attentions is not None and rest.attentions is not None
    sums = [a.sum(-1) - mask[:, None, -a.shape[2] :] for a in (*whole.attentions, *rest.attentions)]
    return {
        "whole": error(whole.logits[mask == 1].detach(), expected, expected),
        "cached": error(behind[mask == 1].detach(), expected, expected),
        "probabilities": max(float(s.detach().abs().max()) for s in sums),
    }


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_holds_where_attention_is_looked_into(
    case: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    write_reference(case, tmp_path)
    for size in (1, 3):
        for errors in ranks(size, deviations, str(tmp_path)):
            assert not {name: e for name, e in errors.items() if not e <= TOLERANCE}, size
