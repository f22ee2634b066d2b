"""transformers' caches in padded calls: read, grown in place as its own models do it, and taken over by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from parallel.errors import RequestError
from parallel.ranks.group import Group
from tests.tp_decoders.families.parity import TOLERANCE, error
from tests.tp_decoders.model.cross_cases import CASES as CROSSING
from tests.tp_decoders.model.cross_cases import encoder_states
from tests.tp_decoders.padded.padded_cases import (
    MODELS,
    QUIET,
    TIME,
    batch_ids,
    cache_errors,
    cached,
    masks,
    padded_error,
    reference_model,
    write_scenario,
)
from tp_decoders import load
from tp_decoders.padded.padded_model import PaddedModel
from tp_decoders.padded.padded_outputs import reorder_cache

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
CUTS = (2, 4)


def layers(cache: Any) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def grown(group: Group, folder: str) -> dict[str, float]:
    """Three calls over one cache, which all hand back, against transformers' over its own."""
    reference = torch.load(Path(folder) / "reference.pt", weights_only=False)
    model, cache = load(folder, group=group), DynamicCache()
    for call in reference["calls"]:
        out = PaddedModel(model)(**call, past_key_values=cache)
        assert out.past_key_values is cache
    assert out.loss is not None and cache.get_seq_length() == TIME
    whole = reference["calls"][-1]["attention_mask"]
    here = whole[:, -reference["logits"].shape[1] :, None]
    held: Any = SimpleNamespace(past_key_values=layers(cache))
    errors = {"logits": padded_error(out.logits, reference["logits"], here)}
    errors["loss"] = error(out.loss.detach(), reference["loss"].detach(), reference["loss"].detach())
    return errors | cache_errors(model, held, reference["cache"], whole)


@pytest.mark.parametrize("case", MODELS)
def test_a_dynamic_cache_grows_as_transformers_own_does(
    case: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    write_scenario(reference_model(case), case, cached(case, "left", CUTS), tmp_path)
    for size in (1, 2):
        for errors in ranks(size, grown, str(tmp_path)):
            assert not {name: e for name, e in errors.items() if not e <= TOLERANCE}, size


@pytest.mark.parametrize("case", MODELS)
def test_transformers_goes_on_from_our_cache_and_we_from_its(case: str, tmp_path: Path) -> None:
    theirs = reference_model(case)
    theirs.save_pretrained(tmp_path)
    ours, ids = PaddedModel(load(tmp_path)), batch_ids()
    with torch.no_grad():
        whole = theirs(ids).logits[:, CUTS[0] :]
        begun_here = ours(ids[:, : CUTS[0]], past_key_values=DynamicCache(), use_cache=True).past_key_values
        begun_there = theirs(ids[:, : CUTS[0]], use_cache=True).past_key_values
        for model, begun in ((theirs, begun_here), (ours, begun_there)):
            end = model(input_ids=ids[:, CUTS[0] :], past_key_values=begun, use_cache=True)
            assert error(end.logits, whole, whole) <= TOLERANCE


def test_a_cache_grows_even_where_it_is_not_to_be_handed_back(tmp_path: Path) -> None:
    theirs = reference_model("gpt2")
    theirs.save_pretrained(tmp_path)
    for model in (theirs, PaddedModel(load(tmp_path))):
        cache = DynamicCache()
        assert model(batch_ids(), past_key_values=cache, **QUIET).past_key_values is None
        assert cache.get_seq_length() == TIME


def crossed(folder: Path, caches: list[Any]) -> None:
    """The same two calls through tuples and through caches, which must hold the same bits."""
    padded, past = PaddedModel(load(folder)), None
    call: dict[str, Any] = {"encoder_hidden_states": encoder_states(), "use_cache": True}
    handed: list[Any] = list(caches)
    for columns in (slice(0, 4), slice(4, None)):
        whole = masks()["left"][:, : columns.stop]
        asked = {"input_ids": batch_ids()[:, columns], "attention_mask": whole, **call}
        out = padded(**asked, past_key_values=past)
        past = out.past_key_values
        for i, cache in enumerate(handed):
            again = padded(**asked, past_key_values=cache)
            handed[i] = again.past_key_values
            assert torch.equal(again.logits, out.logits)
            own, cross = layers(handed[i].self_attention_cache), layers(handed[i].cross_attention_cache)
            assert past is not None
            for layer, kv, states in zip(past, own, cross, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(layer, (*kv, *states), strict=True))


def test_with_an_encoder_both_caches_are_in_one(tmp_path: Path) -> None:
    torch.manual_seed(2)
    CROSSING["gpt2"]().save_pretrained(tmp_path)
    two = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        crossed(tmp_path, [two, DynamicCache()])
    assert two.get_seq_length() == TIME and all(two.is_updated.values())


def test_a_loop_over_a_cache_whose_rows_change_places_is_one_over_tuples(tmp_path: Path) -> None:
    reference_model("gpt_neox").save_pretrained(tmp_path)
    padded, order, logits = PaddedModel(load(tmp_path)), torch.tensor([2, 0, 0]), []
    for past in (None, DynamicCache()):
        ids, mask = batch_ids(), masks()["left"]
        for _ in range(3):
            call = padded.prepare_inputs_for_generation(ids, attention_mask=mask, past_key_values=past)
            out = padded(**call, use_cache=True)
            past = reorder_cache(out.past_key_values, order)
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)[order]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)[order]
        logits.append(out.logits)
    assert logits[0].shape[1] == 1 and torch.equal(logits[0], logits[1])


def test_other_kinds_of_past_are_refused_by_name(tmp_path: Path) -> None:
    theirs = reference_model("gpt2")
    theirs.save_pretrained(tmp_path)
    padded = PaddedModel(load(tmp_path))
    for past in (StaticCache(theirs.config, max_cache_len=8), object()):
        with pytest.raises(RequestError, match=f"past_key_values of type {type(past).__name__}; give what an earlier"):
            padded(batch_ids(), past_key_values=past)
    other = DynamicCache()
    for layer in range(2):
        other.update(torch.zeros(3, 1, 2, 6), torch.zeros(3, 1, 2, 6), layer)
    with pytest.raises(RequestError, match="past_key_values of shapes"):
        padded(batch_ids(), past_key_values=other)
