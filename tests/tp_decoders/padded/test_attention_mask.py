"""attention_mask with four axes against transformers: what every column sees, in place of causality; also cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from parallel.errors import RequestError
from tests.tp_decoders.families.parity import TOLERANCE, error
from tests.tp_decoders.padded.padded_cases import (
    BATCH,
    MODELS,
    TIME,
    WATCHED,
    Scenario,
    batch_ids,
    deviation,
    family,
    labels_for,
    reference_model,
    write_scenario,
)
from tp_decoders import load
from tp_decoders.padded.padded_model import PaddedModel

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
LOWEST = torch.finfo(torch.float32).min


def seen() -> Tensor:
    """Neither causal nor symmetric; every column sees itself."""
    mask = torch.rand(BATCH, 1, TIME, TIME, generator=torch.Generator().manual_seed(8)) < 0.6
    return mask | torch.eye(TIME, dtype=torch.bool)


def added(heads: int) -> Tensor:
    """Summands of the scores, hidden columns among them."""
    summands = torch.randn(BATCH, heads, TIME, TIME, generator=torch.Generator().manual_seed(9))
    return summands.masked_fill(~seen(), LOWEST)


def to_reference(case: str, mask: Tensor) -> Tensor:
    """transformers' eager attention adds a mask whatever its type is; its MPT reads 0 and 1."""
    if mask.dtype is not torch.bool:
        return mask
    return mask.long() if family(case) == "mpt" else torch.zeros(mask.shape).masked_fill(~mask, LOWEST)


def scenario(case: str, mask: Tensor, cuts: tuple[int, ...] = ()) -> Scenario:
    ids, ours, theirs, start = batch_ids(), [], [], 0
    if family(case) == "gpt2":  # whose eager attention is causal besides; its sdpa is not: below
        future = torch.ones(TIME, TIME).triu(1).bool()
        mask = mask & ~future if mask.dtype is torch.bool else mask.masked_fill(future, LOWEST)
    for stop in (*cuts, TIME):
        part = mask[:, :, start:stop, :stop]
        ours.append({"input_ids": ids[:, start:stop], "attention_mask": part, **WATCHED})
        theirs.append({**ours[-1], "attention_mask": to_reference(case, part)})
        if family(case) != "mpt":
            theirs[-1]["position_ids"] = torch.arange(start, stop)[None]
        start = stop
    labels = labels_for(ids, torch.ones_like(ids))[:, cuts[-1] if cuts else 0 :]
    ours[-1]["labels"] = theirs[-1]["labels"] = labels
    return Scenario(ours, theirs)


MASKS: dict[str, Callable[[str], Scenario]] = {
    "bool": lambda case: scenario(case, seen()),
    "bool, cached": lambda case: scenario(case, seen(), (2, 4)),
    "added": lambda case: scenario(case, added(1)),
    "added by head, cached": lambda case: scenario(case, added(MODELS[case]().config.num_attention_heads), (4,)),
}


@pytest.mark.parametrize(
    ("case", "mask"),
    [(case, mask) for mask in MASKS for case in MODELS if "bool" in mask or family(case) != "mpt"],
)
def test_a_mask_of_four_axes_equals_transformers(
    case: str, mask: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    write_scenario(reference_model(case), case, MASKS[mask](case), tmp_path)
    for size in (1, 2):
        for errors in ranks(size, deviation, str(tmp_path)):
            assert not {name: e for name, e in errors.items() if not e <= TOLERANCE}, size


@pytest.mark.parametrize("mask", [seen(), added(4)], ids=["bool", "added by head"])
def test_gpt2_is_not_causal_besides_as_with_transformers_sdpa(mask: Tensor, tmp_path: Path) -> None:
    reference_model("gpt2").save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    with torch.no_grad():
        wanted = theirs(batch_ids(), attention_mask=mask).logits
        found = PaddedModel(load(tmp_path))(batch_ids(), attention_mask=mask).logits
    assert error(found, wanted, wanted) <= TOLERANCE


def test_causality_as_such_a_mask_changes_nothing(tmp_path: Path) -> None:
    reference_model("gpt_neox").save_pretrained(tmp_path)
    padded = PaddedModel(load(tmp_path))
    causal = torch.ones(TIME, TIME).tril().bool().expand(BATCH, 1, TIME, TIME)
    with torch.no_grad():
        plain, masked = padded(batch_ids()), padded(batch_ids(), attention_mask=causal)
    assert (plain.logits - masked.logits).abs().max() <= 1e-5


REFUSED: dict[str, tuple[str, Tensor, str]] = {
    "other columns": ("gpt2", seen()[..., 1:], "with four axes it is [3, 1, 7, 7]"),
    "another number of heads": ("gpt2", added(3), "with four axes it is [3, 4, 7, 7]"),
    "whole numbers": ("gpt2", seen().long(), "give bool"),
    "numbers with ALiBi": ("mpt", added(1), "give bool"),
    "heads with ALiBi": ("mpt", seen().expand(-1, 3, -1, -1), "and 1 for models with ALiBi"),
    "nothing seen": ("gpt_neox", seen() & (torch.arange(TIME) != 2)[:, None], "hides every column from one"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_other_masks_are_refused_by_name(wrong: str, tmp_path: Path) -> None:
    case, mask, said = REFUSED[wrong]
    reference_model(case).save_pretrained(tmp_path)
    with pytest.raises(RequestError) as caught:
        PaddedModel(load(tmp_path))(batch_ids(), attention_mask=mask)
    assert said in str(caught.value)
