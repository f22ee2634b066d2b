"""Wrong calls of the padded interface: a named error that says what was given and the rule, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.errors import ConfigError, RequestError
from parallel.ranks.group import Group
from tests.tp_decoders.families.parity import GPT2, hf
from tests.tp_decoders.padded.padded_cases import BATCH, MODELS, STATES, TIME, batch_ids, reference_model
from tp_decoders import load
from tp_decoders.padded.padded_model import PaddedModel

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

IDS, ONES = batch_ids(), torch.ones(BATCH, TIME, dtype=torch.long)
D, N, H, L = 24, 4, 6, 2
PAST = tuple((torch.zeros(BATCH, N, 3, H), torch.zeros(BATCH, N, 3, H)) for _ in range(L))
HOLES = ONES.clone()
HOLES[1, 2] = 0
CROSS = {"encoder_hidden_states": torch.zeros(BATCH, STATES, D)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PaddedModel]:
    """By case; "crossing" is a GPT-2 with cross-attention."""
    made: dict[str, PaddedModel] = {}

    def of(case: str) -> PaddedModel:
        if case not in made:
            folder = tmp_path_factory.mktemp("model")
            model = hf("GPT2", GPT2, add_cross_attention=True)() if case == "crossing" else reference_model(case)
            model.save_pretrained(folder)
            made[case] = PaddedModel(load(folder))
        return made[case]

    return of


EVERY: dict[str, tuple[dict[str, Any], str]] = {
    "both inputs": ({"input_ids": IDS, "inputs_embeds": torch.zeros(BATCH, TIME, D)}, "both input_ids and inputs_emb"),
    "neither input": ({}, "neither input_ids nor inputs_embeds"),
    "one axis": ({"input_ids": IDS[0]}, "input_ids are [batch, time]"),
    "no batch": ({"input_ids": IDS[:0]}, "at least one token"),
    "no time": ({"input_ids": IDS[:, :0]}, "at least one token"),
    "embeddings of another width": ({"inputs_embeds": torch.zeros(1, 2, 5)}, "inputs_embeds of width 5"),
    "embeddings with two axes": ({"inputs_embeds": torch.zeros(2, D)}, "inputs_embeds are [batch, time, "),
    "fractions for ids": ({"input_ids": IDS.float()}, "input_ids of type torch.float32"),
    "ids beyond the vocabulary": ({"input_ids": IDS + 40}, "the vocabulary is 0 to "),
    "negative ids": ({"input_ids": IDS - 40}, "the vocabulary is 0 to "),
    "a mask of another size": ({"input_ids": IDS, "attention_mask": ONES[:, 1:]}, "attention_mask of shape [3, 6]"),
    "a mask of four axes": ({"input_ids": IDS, "attention_mask": ONES[:, None, None]}, "attention_mask of shape"),
    "a mask of other numbers": ({"input_ids": IDS, "attention_mask": ONES * 0.5}, "other numbers than 0"),
    "a mask of nothing": ({"input_ids": IDS, "attention_mask": ONES * 0}, "hides every token"),
    "head_mask of another size": ({"input_ids": IDS, "head_mask": torch.ones(7)}, "head_mask of shape [7]"),
    "head_mask of three axes": ({"input_ids": IDS, "head_mask": torch.ones(1, 2, 4)}, "head_mask of shape"),
    "labels of another size": ({"input_ids": IDS, "labels": IDS[:, 1:]}, "labels of shape [3, 6]"),
    "labels on padding": ({"input_ids": IDS, "attention_mask": HOLES, "labels": IDS}, "labels on padding"),
    "labels beyond the vocabulary": ({"input_ids": IDS, "labels": IDS + 40}, "labels from"),
    "past of too few layers": ({"input_ids": IDS, "past_key_values": PAST[:1]}, "past_key_values of 1 layers"),
    "past of single tensors": ({"input_ids": IDS, "past_key_values": [(PAST[0][0],)] * L}, "with [1] tensors each"),
    "past of another batch": ({"input_ids": IDS[:2], "past_key_values": PAST}, "past_key_values of shapes"),
    "past of uneven length": ({"input_ids": IDS, "past_key_values": (PAST[0], tuple(x[:, :, 1:] for x in PAST[1]))},
                              "past_key_values of shapes"),
    "an encoder": ({"input_ids": IDS, **CROSS}, "without cross-attention"),
    "an encoder's mask alone": ({"input_ids": IDS, "encoder_attention_mask": ONES}, "without encoder_hidden_states"),
    "logits_to_keep beyond the columns": ({"input_ids": IDS, "logits_to_keep": TIME + 1}, "logits_to_keep = 8"),
    "an unknown input": ({"input_ids": IDS, "attention_masks": ONES}, "unknown inputs ['attention_masks']"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("wrong", EVERY)
def test_is_refused_by_every_family(wrong: str, case: str, models: Callable[[str], PaddedModel]) -> None:
    call, said = EVERY[wrong]
    with pytest.raises(RequestError) as caught:
        models(case)(**call)
    assert said in str(caught.value)


SOME: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt_neox token_type_ids": ("gpt_neox", {"input_ids": IDS, "token_type_ids": IDS}, "no token types"),
    "gpt_neox_japanese token_type_ids": ("gpt_neox_japanese", {"input_ids": IDS, "token_type_ids": IDS}, "no token t"),
    "mpt token_type_ids": ("mpt", {"input_ids": IDS, "token_type_ids": IDS}, "no token types"),
    "gpt2 token_type_ids of another size": ("gpt2", {"input_ids": IDS, "token_type_ids": IDS[:1]}, "token_type_ids of"),
    "gpt2 token_type_ids beyond": ("gpt2", {"input_ids": IDS, "token_type_ids": IDS + 40}, "token_type_ids from"),
    "mpt position_ids": ("mpt", {"input_ids": IDS, "position_ids": IDS}, "a model with ALiBi"),
    "gpt2 position_ids beyond": ("gpt2", {"input_ids": IDS, "position_ids": IDS + 31}, "the model has 0 to 31"),
    "gpt2 position_ids negative": ("gpt2", {"input_ids": IDS, "position_ids": IDS - 31}, "the model has 0 to 31"),
    "gpt2 position_ids of another size": ("gpt2", {"input_ids": IDS, "position_ids": IDS[:2]}, "position_ids of shape"),
    "gpt2 too long": ("gpt2", {"input_ids": IDS.repeat(1, 5)}, "positions 0 to 34"),
    "mpt too long": ("mpt", {"input_ids": IDS.repeat(1, 5)}, "positions 0 to 34"),
    "gpt2 past of another head": (
        "gpt2", {"input_ids": IDS, "past_key_values": [(torch.zeros(BATCH, N, 3, 5),) * 2] * L}, "here [3, 4, 3, 6]"),
    "gpt2 past of other heads": (
        "gpt2", {"input_ids": IDS, "past_key_values": [(torch.zeros(BATCH, 2, 3, H),) * 2] * L}, "here [3, 4, 3, 6]"),
    "gpt2 mask of the new columns only": (
        "gpt2", {"input_ids": IDS, "past_key_values": PAST, "attention_mask": ONES}, "it is [3, 10] here"),
    "crossing mask alone": ("crossing", {"input_ids": IDS, "encoder_attention_mask": ONES}, "without encoder_hidden"),
    "crossing states of another batch": (
        "crossing", {"input_ids": IDS[:2], **CROSS}, "encoder_hidden_states of shape [3, 5, 24]"),
    "crossing states of another width": (
        "crossing", {"input_ids": IDS, "encoder_hidden_states": torch.zeros(BATCH, STATES, 5)}, "[3, states, 24]"),
    "crossing mask of another size": (
        "crossing", {"input_ids": IDS, **CROSS, "encoder_attention_mask": ONES}, "encoder_attention_mask of shape"),
    "crossing mask of nothing": (
        "crossing", {"input_ids": IDS, **CROSS, "encoder_attention_mask": torch.zeros(BATCH, STATES)},
        "hides every encoder state"),
    "crossing past without its states": (
        "crossing", {"input_ids": IDS, "past_key_values": [(*kv, *kv) for kv in PAST]}, "without encoder_hidden"),
    "crossing past of other states": (
        "crossing", {"input_ids": IDS, "past_key_values": [(*kv, *kv) for kv in PAST], **CROSS},
        "the past of an encoder is [3, 4, 5, 6]"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", SOME)
def test_is_refused(wrong: str, models: Callable[[str], PaddedModel]) -> None:
    case, call, said = SOME[wrong]
    with pytest.raises(RequestError) as caught:
        models(case)(**call)
    assert said in str(caught.value)


def test_padding_may_hold_anything_but_labels(models: Callable[[str], PaddedModel]) -> None:
    ids = IDS.masked_fill(HOLES == 0, -7)
    labels = ids.masked_fill(HOLES == 0, -100)
    out = models("gpt2")(ids, attention_mask=HOLES.bool(), labels=labels)
    assert out.loss is not None and torch.isfinite(out.loss)


def test_gpt_bigcode_with_multi_query_has_no_cross_attention() -> None:
    from tp_decoders.registry import config_from_hf

    with pytest.raises(ConfigError, match="multi_query = false only"):
        config_from_hf({"model_type": "gpt_bigcode", "add_cross_attention": True})


def refused(group: Group, folder: str) -> str:
    try:
        PaddedModel(load(folder, group=group))(IDS + 40)
    except RequestError as error:
        return str(error)
    return ""


def test_every_rank_refuses_alike(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    reference_model("gpt2").save_pretrained(tmp_path)
    errors = ranks(2, refused, str(tmp_path))
    assert errors[0] == errors[1] and "vocabulary" in errors[0]
