"""A loop over padded calls, as transformers' generate is one: the same tokens, from a batch padded on either side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.ranks.group import Group
from tests.tp_decoders.families.parity import TOLERANCE
from tests.tp_decoders.padded.padded_cases import MODELS, SIZES, batch_ids, masks, reference_model
from tp_decoders import load
from tp_decoders.padded.padded_model import PaddedModel

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

NEW = 8


def greedy(group: Group, folder: str, mask: Tensor, from_embeddings: bool) -> tuple[Tensor, Tensor]:
    """The new tokens, and the logits that each was taken from."""
    with torch.no_grad():
        return continued(PaddedModel(load(folder, group=group)), mask, from_embeddings)


def continued(padded: PaddedModel, mask: Tensor, from_embeddings: bool) -> tuple[Tensor, Tensor]:
    ids, past, seen = batch_ids(), None, []
    embeds = padded.embeddings(ids) if from_embeddings else None
    for _ in range(NEW):
        call = padded.prepare_inputs_for_generation(
            ids, attention_mask=mask, past_key_values=past, inputs_embeds=embeds
        )
        out = padded(**call, use_cache=True)
        past = out.past_key_values
        places = (mask[:, -out.logits.shape[1] :].cumsum(1)).argmax(1)  # the row's last token
        seen.append(out.logits[torch.arange(len(ids)), places])
        ids = torch.cat([ids, seen[-1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids[:, -NEW:], torch.stack(seen, 1)


def generated(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same of transformers."""
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=40, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences[:, -NEW:], torch.stack(out.logits, 1)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], size: int) -> None:
    assert torch.equal(found[0], expected[0]), size
    assert (found[1] - expected[1]).abs().max() <= TOLERANCE * expected[1].abs().max(), size


@pytest.mark.parametrize("case", MODELS)
def test_a_loop_over_padded_calls_generates_what_transformers_does(
    case: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    model = reference_model(case)
    model.save_pretrained(tmp_path)
    left = masks()["left"]
    expected = generated(model, batch_ids(), left)
    for size in SIZES:
        for from_embeddings in (False, True):
            for found in ranks(size, greedy, str(tmp_path), left, from_embeddings):
                assert_same(found, expected, size)


@pytest.mark.parametrize("case", [case for case in MODELS if case != "mpt"])
def test_prompts_padded_on_the_right_are_continued_alike(
    case: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """What follows stands behind the gap; positions count tokens. (ALiBi counts the columns of the gap, too.)"""
    model = reference_model(case)
    model.save_pretrained(tmp_path)
    right = masks()["right"]
    tokens, logits = ranks(2, greedy, str(tmp_path), right, False)[0]
    for row, length in enumerate(right.sum(1).tolist()):
        prompt = batch_ids()[row : row + 1, :length]
        expected = generated(model, prompt, torch.ones_like(prompt))
        assert_same((tokens[row : row + 1], logits[row : row + 1]), expected, row)
