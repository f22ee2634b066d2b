"""What must not change a padded call's results: the side of the padding, the cache, recomputation, how tokens are
divided, what else is asked for; and dropout, whose masks go with the seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.attention.forward_pass import Pass
from parallel.layers.dropout import Dropping, token_keys
from parallel.options import Recompute
from parallel.ranks.group import Group
from tests.tp_decoders.padded.padded_cases import (
    MODELS,
    QUIET,
    SIZES,
    TIME,
    WATCHED,
    batch_ids,
    family,
    labels_for,
    masks,
    reference_model,
)
from tp_decoders import load
from tp_decoders.model.decoder import Decoder
from tp_decoders.padded.padded_model import PaddedModel
from tp_decoders.padded.padded_outputs import CausalOutput, reorder_cache

# importing transformers' GPT-BigCode warns
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

DROPOUTS: dict[str, dict[str, Any]] = {
    "gpt2": {"embd_pdrop": 0.1, "attn_pdrop": 0.3, "resid_pdrop": 0.2},
    "gpt_bigcode": {"embd_pdrop": 0.1, "attn_pdrop": 0.3, "resid_pdrop": 0.2},
    "llama": {"attention_dropout": 0.3},
    "gpt_neox": {"hidden_dropout": 0.2, "attention_dropout": 0.3},
    "gpt_neox_japanese": {"hidden_dropout": 0.2, "attention_dropout": 0.3},
    "mpt": {"attn_config": {"attn_pdrop": 0.2}, "resid_pdrop": 0.2, "emb_pdrop": 0.1},
}


def largest(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def shifted(side: str) -> tuple[Tensor, Tensor]:
    """The same three rows of 7, 4 and 1 tokens, padded on the right or on the left."""
    ids, mask = batch_ids(), masks()["right"]
    if side == "left":
        for row, length in enumerate(mask.sum(1).tolist()):
            ids[row] = ids[row].roll(TIME - length)
        mask = masks()["right"].flip(1)
    return ids, mask


def sides(padded: PaddedModel) -> float:
    """Logits, loss and hidden states of right-padded, left-padded and lone rows: the same bits."""
    out, errors = {}, []
    for side in ("right", "left"):
        ids, mask = shifted(side)
        asked = {**QUIET, "output_hidden_states": True}
        out[side] = padded(ids, attention_mask=mask, labels=labels_for(ids, mask) if side == "right" else None, **asked)
    ids, lengths = batch_ids(), masks()["right"].sum(1).tolist()
    for row, length in enumerate(lengths):
        lone = padded(ids[row : row + 1, :length], **{**QUIET, "output_hidden_states": True})
        for name in ("logits", "hidden_states"):
            triples = zip(*(_all(o, name) for o in (lone, out["right"], out["left"])), strict=True)
            for alone, right, left in triples:
                errors.append(largest(alone[0], right[row, :length]))
                errors.append(largest(alone[0], left[row, TIME - length :]))
    return max(errors)


def _all(out: CausalOutput, name: str) -> tuple[Tensor, ...]:
    found = getattr(out, name)
    return found if isinstance(found, tuple) else (found,)


def losses(padded: PaddedModel) -> float:
    """The loss of a batch padded on either side, and the mean over the lone rows' labels."""
    ids, mask = shifted("right")
    right = padded(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), **QUIET).loss
    left_ids, left_mask = shifted("left")
    left = padded(left_ids, attention_mask=left_mask, labels=left_ids.masked_fill(left_mask == 0, -100), **QUIET).loss
    alone = [padded(ids[i : i + 1, :n], labels=ids[i : i + 1, :n], **QUIET).loss for i, n in ((0, 7), (1, 4))]
    assert right is not None and left is not None and alone[0] is not None and alone[1] is not None
    return max(largest(right, left), largest(right, (alone[0] * 6 + alone[1] * 3) / 9))


def cached(padded: PaddedModel) -> float:
    """Token by token over a left-padded batch, with the rows' order changed on the way, as beam search does."""
    ids, mask = shifted("left")
    whole = padded(ids, attention_mask=mask, **WATCHED)
    past, errors, order = None, [], torch.arange(3)
    for column in range(TIME):
        if column == 4:
            order = torch.tensor([2, 0, 0])
            assert past is not None
            past = reorder_cache(past, order)
        here = mask[order, : column + 1]
        if not here[:, -1].any():
            continue
        first = 0 if past is None else column
        out = padded(ids[order, first : column + 1], attention_mask=here, past_key_values=past, **WATCHED)
        past = out.past_key_values
        errors.append(largest(out.logits[:, -1], whole.logits[order, column]))
        assert out.attentions is not None and whole.attentions is not None
        errors.append(largest(out.attentions[1][:, :, -1], whole.attentions[1][order, :, column, : column + 1]))
    return max(errors)


def columns_kept(padded: PaddedModel) -> float:
    ids, mask = shifted("left")
    whole = padded(ids, attention_mask=mask, labels=labels_for(ids, mask), **QUIET)
    tail = padded(ids, attention_mask=mask, labels=labels_for(ids, mask), logits_to_keep=2, **QUIET)
    assert whole.loss is not None and tail.loss is not None
    return max(largest(whole.logits[:, -2:], tail.logits), largest(whole.loss, tail.loss))


def empty_row(padded: PaddedModel) -> float:
    """A row without a token changes nothing for the others."""
    ids, mask = shifted("right")
    mask[1] = 0
    out = padded(ids, attention_mask=mask, **WATCHED)
    rest = padded(ids[[0, 2]], attention_mask=mask[[0, 2]], **WATCHED)
    assert out.attentions and rest.attentions and out.past_key_values and rest.past_key_values
    assert not out.logits[1].any() and not out.attentions[0][1].any()
    pairs = [(out.logits, rest.logits), (out.attentions[1], rest.attentions[1])]
    pairs += list(zip(out.past_key_values[1], rest.past_key_values[1], strict=True))
    return max(largest(a[[0, 2]], b) for a, b in pairs if b.numel())


def asking(padded: PaddedModel) -> float:
    """What is asked for besides, and the form of the result."""
    ids, mask = shifted("left")
    quiet = padded(ids, attention_mask=mask, **QUIET)
    asked = padded(ids, attention_mask=mask, head_mask=torch.ones(padded.model.config.n_heads), **WATCHED)
    states = padded.states(ids, attention_mask=mask, **WATCHED)
    assert asked.hidden_states is not None and quiet.to_tuple() == (quiet.logits,) and quiet[0] is quiet["logits"]
    assert len(asked.to_tuple()) == 4 and len(list(states)) == 4
    same = largest(states.last_hidden_state, asked.hidden_states[-1])
    return max(largest(quiet.logits, asked.logits), same * 1e6)


def gradients(model: Decoder, **inputs: Any) -> tuple[list[Tensor], CausalOutput]:
    model.zero_grad()
    ids, mask = shifted("left")
    labels = ids.masked_fill(mask == 0, -100)
    out = PaddedModel(model)(ids, attention_mask=mask, labels=labels, **{**WATCHED, **inputs})
    assert out.loss is not None and out.attentions is not None
    (out.loss + out.attentions[0].square().mean()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None], out


def recomputed(group: Group, folder: str) -> float:
    """With blocks computed again in the backward, or their tokens divided over the ranks, or both."""
    grads, out = gradients(load(folder, group=group), seed=None)
    errors = []
    layouts: list[tuple[Recompute, bool]] = [("selective", False), ("full", False), ("full", True)]
    for recompute, divided in layouts:
        model = load(folder, group=replace(group, sequence_parallel=divided))
        model.recompute = recompute
        again, other = gradients(model)
        errors += [largest(a, b) for a, b in zip(grads, again, strict=True) if a.numel()]
        assert out.hidden_states and other.hidden_states
        errors += [largest(a, b) for a, b in zip(out.hidden_states, other.hidden_states, strict=True)]
    return max(errors)


def dropped(group: Group, folder: str) -> dict[str, Any]:
    """Dropout by a seed: what it gives, and how far other ways to the same are from it."""
    model = load(folder, group=group).train()
    padded, (ids, mask) = PaddedModel(model), shifted("left")
    out = padded(ids, attention_mask=mask, seed=5, **QUIET).logits
    asked = padded(ids, attention_mask=mask, seed=5, **WATCHED).logits
    first = padded(ids[:, :5], attention_mask=mask[:, :5], seed=5, use_cache=True)
    behind = padded(ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values, seed=5, use_cache=True)
    lengths = mask.sum(1).tolist()
    now = Pass.packed(lengths, dropping=Dropping(5, token_keys(range(3), lengths)))
    flat = model.head.gather(model(ids[mask == 1], now))
    torch.manual_seed(8)
    drawn, other = (padded(ids, attention_mask=mask, **QUIET).logits for _ in range(2))
    torch.manual_seed(8)
    again = padded(ids, attention_mask=mask, **QUIET).logits
    return {
        "logits": out.detach(),
        "drawn": drawn.detach(),
        "flat": largest(out[mask == 1], flat),
        "asked": largest(out, asked),
        "cached": largest(out[:, 5:], behind.logits),
        "repeated": largest(drawn, again),
        "moved": min(largest(drawn, other), largest(out, model_eval(model, ids, mask))),
    }


def model_eval(model: Decoder, ids: Tensor, mask: Tensor) -> Tensor:
    out = PaddedModel(model.eval())(ids, attention_mask=mask, **QUIET).logits
    model.train()
    return out


CHECKS: dict[str, tuple[Callable[[PaddedModel], float], float]] = {
    "left-padded = right-padded = unpadded": (sides, 0.0),
    "the loss on either side": (losses, 1e-6),
    "cached = uncached": (cached, 2e-5),
    "logits_to_keep": (columns_kept, 0.0),
    "a row without tokens": (empty_row, 0.0),
    "whatever else is asked for": (asking, 2e-5),
}


def all_checks(group: Group, folder: str, dropping: str) -> dict[str, Any]:
    """In one call, since the ranks' models are the same: the errors by check, with gradients and without."""
    found: dict[str, Any] = {}
    for name, (check, _) in CHECKS.items():
        found[name] = check(PaddedModel(load(folder, group=group)))
        with torch.no_grad():
            found[name] = max(found[name], check(PaddedModel(load(folder, group=group))))
    return {**found, "recomputed": recomputed(group, folder), "dropped": dropped(group, dropping)}


Found = Callable[[str], dict[int, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def found(ranks: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Every check of a case on all sizes, made once."""
    made: dict[str, dict[int, list[dict[str, Any]]]] = {}

    def of(case: str) -> dict[int, list[dict[str, Any]]]:
        if case not in made:
            folder, dropping = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("dropping")
            model = reference_model(case)
            model.save_pretrained(folder)
            model.save_pretrained(dropping)
            with_dropout(dropping, DROPOUTS[family(case)])
            made[case] = {size: ranks(size, all_checks, str(folder), str(dropping)) for size in SIZES}
        return made[case]

    return of


def with_dropout(folder: Path, options: dict[str, Any]) -> None:
    path = folder / "config.json"
    hf = json.loads(path.read_text())
    path.write_text(json.dumps({**hf, **options, "attn_config": {**hf.get("attn_config", {}), **options["attn_config"]}}
                               if "attn_config" in options else {**hf, **options}))  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("check", CHECKS)
def test_results_do_not_depend_on(check: str, case: str, found: Found) -> None:
    for size, results in found(case).items():
        assert max(result[check] for result in results) <= CHECKS[check][1], size


@pytest.mark.parametrize("case", MODELS)
def test_gradients_and_outputs_do_not_depend_on_recomputation_or_division(case: str, found: Found) -> None:
    for size, results in found(case).items():
        assert max(result["recomputed"] for result in results) <= 1e-6, size


@pytest.mark.parametrize("case", MODELS)
def test_dropout_goes_with_the_seed_and_nothing_else(case: str, found: Found) -> None:
    one = found(case)[1][0]["dropped"]
    for size, results in found(case).items():
        for result in results:
            drop = result["dropped"]
            assert drop["flat"] == 0.0 and drop["repeated"] == 0.0, size
            assert drop["asked"] <= 2e-5 and drop["cached"] <= 2e-5, size
            assert drop["moved"] > 1e-3, size
            assert torch.equal(drop["logits"], one["logits"]) and torch.equal(drop["drawn"], one["drawn"]), size
