"""Oracle of the padded calls: transformers on the same inputs, saved for the ranks to compare theirs with.

A scenario makes what our call and the reference's are given; they differ where the reference's default is another (see
tp_decoders.padded.padded_model) or where it cannot do what is asked (head masks: see `masked_heads`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.ranks.group import Group
from parallel.sharding.rules import rule_of
from tests.tp_decoders.families.parity import GPT2, JAPANESE, LLAMA, MPT, NEOX, error, hash_of, hf
from tp_decoders import load
from tp_decoders.model.decoder import Decoder
from tp_decoders.padded.padded_model import PaddedModel
from tp_decoders.padded.padded_outputs import CausalOutput
from tp_decoders.registry import family_of

SIZES = (1, 2, 3)
BATCH, TIME, STATES = 3, 7, 5
WATCHED: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True, "use_cache": True}
QUIET: dict[str, Any] = {"output_attentions": False, "output_hidden_states": False, "use_cache": False}

MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": hf("GPT2", GPT2),
    "gpt_neox": hf("GPTNeoX", NEOX, num_attention_heads=3, hidden_size=24, rotary_pct=0.5),
    "gpt_neox_japanese": hf("GPTNeoXJapanese", JAPANESE),
    "mpt": hf("Mpt", MPT, n_heads=3),
    "gpt_bigcode": hf("GPTBigCode", GPT2, n_head=3),
    "gpt_bigcode multi-head": hf("GPTBigCode", GPT2, multi_query=False),
    "llama": hf("Llama", LLAMA, num_attention_heads=4, num_key_value_heads=2),
}
OUT_PROJECTIONS = {
    "gpt2": "transformer.h.{}.attn.c_proj",
    "gpt_neox": "gpt_neox.layers.{}.attention.dense",
    "gpt_neox_japanese": "gpt_neox_japanese.layers.{}.attention.dense",
    "mpt": "transformer.blocks.{}.attn.out_proj",
    "gpt_bigcode": "transformer.h.{}.attn.c_proj",
    "llama": "model.layers.{}.self_attn.o_proj",
    "qwen3": "model.layers.{}.self_attn.o_proj",
}


@dataclass
class Scenario:
    """The calls of one pass: the first ones only fill the cache; the last one has labels and is compared."""

    ours: list[dict[str, Any]]
    theirs: list[dict[str, Any]]
    head_masks: list[Tensor] | None = None  # by layer, applied to the reference by hand
    grad_of: tuple[str, ...] = ()  # inputs whose gradient is compared
    through_all: bool = False  # gradients not only of the loss but of attentions and hidden states, too


def family(case: str) -> str:
    return case.split(" ")[0]


def masks() -> dict[str, Tensor]:
    """attention_mask by the side of its padding; the first row is full."""
    right = torch.ones(BATCH, TIME, dtype=torch.long)
    right[1, 4:], right[2, 1:] = 0, 0
    gaps = torch.ones(BATCH, TIME, dtype=torch.long)
    gaps[1, 2:4], gaps[2, 1], gaps[2, 6] = 0, 0, 0
    return {"right": right, "left": right.flip(1), "gaps": gaps}


def generate_positions(mask: Tensor) -> Tensor:
    """What transformers' generate makes of a mask."""
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)


def labels_for(ids: Tensor, mask: Tensor) -> Tensor:
    """Without padding, and with one more place that does not count."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 3] = -100
    return labels


def without_firsts(labels: Tensor, mask: Tensor) -> Tensor:
    """The reference counts labels of tokens behind padding, which are predicted from it; these are not ours."""
    behind = mask.roll(1, 1) == 0
    behind[:, 0] = False
    return labels.masked_fill(behind, -100)


def takes_positions(case: str) -> bool:
    return family(case) != "mpt"


def batch_ids() -> Tensor:
    return torch.randint(29, (BATCH, TIME), generator=torch.Generator().manual_seed(11))


def padded(case: str, side: str, **extra: Any) -> Scenario:
    ids, mask = batch_ids(), masks()[side]
    labels = labels_for(ids, mask)
    ours = {"input_ids": ids, "attention_mask": mask, "labels": labels, **extra}
    theirs = {**ours, "labels": without_firsts(labels, mask)}
    if side == "left" and takes_positions(case):
        theirs["position_ids"] = generate_positions(mask)
    return Scenario([ours], [theirs])


def plain(case: str) -> Scenario:
    ids = batch_ids()
    call = {"input_ids": ids, "labels": labels_for(ids, torch.ones_like(ids)), **QUIET}
    return Scenario([call], [call])


def positions(case: str) -> Scenario:
    scenario = padded(case, "right")
    ids = torch.randint(31, (BATCH, TIME), generator=torch.Generator().manual_seed(5))
    for call in (*scenario.ours, *scenario.theirs):
        call["position_ids"] = ids
    return scenario


def one_row_of_positions(case: str) -> Scenario:
    scenario = padded(case, "right")
    for call in (*scenario.ours, *scenario.theirs):
        call["position_ids"] = torch.arange(9, 9 + TIME)[None]
    return scenario


def token_types(case: str) -> Scenario:
    types = torch.randint(29, (BATCH, TIME), generator=torch.Generator().manual_seed(6))
    return padded(case, "left", token_type_ids=types, **QUIET)


def head_mask(case: str, per_layer: bool) -> Scenario:
    """Fractions, a head switched off, and one turned up."""
    heads = MODELS[case]().config.num_attention_heads
    mask = torch.tensor([[0.0, 1.0, 0.3, 2.0], [1.0, 0.5, 0.0, 1.0]])[: 2 if per_layer else 1, :heads]
    mask = mask if per_layer else mask[0]
    scenario = padded(case, "left", **WATCHED)
    scenario.ours[0]["head_mask"] = mask
    if family(case) in ("gpt2", "gpt_bigcode", "gpt_neox_japanese"):
        scenario.theirs[0]["head_mask"] = mask
    else:
        scenario.head_masks = list(mask.expand(2, heads))
    return scenario


def through_all(case: str) -> Scenario:
    scenario = padded(case, "left", **WATCHED)
    scenario.through_all = True
    return scenario


def embeds(case: str) -> Scenario:
    scenario = padded(case, "right")
    width = MODELS[case]().config.hidden_size
    x = torch.randn(BATCH, TIME, width, generator=torch.Generator().manual_seed(7))
    for call in (*scenario.ours, *scenario.theirs):
        del call["input_ids"]
        call["inputs_embeds"] = x
    scenario.grad_of = ("inputs_embeds",)
    return scenario


def cached(case: str, side: str, cuts: tuple[int, ...]) -> Scenario:
    """The call cut into several, each handed what the one before returned."""
    whole = padded(case, side)
    ids, mask, labels = batch_ids(), masks()[side], whole.ours[0]["labels"]
    ours, theirs = [], []
    places = generate_positions(mask) if side == "left" else torch.arange(TIME).expand(BATCH, TIME)
    for start, stop in zip((0, *cuts), (*cuts, TIME), strict=True):
        call = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop], "use_cache": True}
        ours.append({**call, **(WATCHED if stop == TIME else {})})
        theirs.append(dict(ours[-1]))
        if takes_positions(case):
            theirs[-1]["position_ids"] = places[:, start:stop]
    ours[-1]["labels"] = labels[:, cuts[-1] :]
    theirs[-1]["labels"] = without_firsts(labels, mask)[:, cuts[-1] :]
    return Scenario(ours, theirs)


FEATURES: dict[str, Callable[[str], Scenario]] = {
    "no mask, no extras": plain,
    "right padding": lambda case: padded(case, "right", **QUIET),
    "left padding": lambda case: padded(case, "left", **QUIET),
    "gaps in the mask": lambda case: padded(case, "gaps", **WATCHED),
    "attentions, hidden states and cache": lambda case: padded(case, "left", **WATCHED),
    "gradients through attentions and hidden states": through_all,
    "position_ids": positions,
    "position_ids shared by rows": one_row_of_positions,
    "token_type_ids": token_types,
    "head_mask per layer": lambda case: head_mask(case, True),
    "head_mask shared by layers": lambda case: head_mask(case, False),
    "inputs_embeds": embeds,
    "past, left padding": lambda case: cached(case, "left", (5,)),
    "past, right padding": lambda case: cached(case, "right", (2, 4)),
}
ONLY = {
    "position_ids": [case for case in MODELS if takes_positions(case)],
    "position_ids shared by rows": [case for case in MODELS if takes_positions(case)],
    "token_type_ids": ["gpt2", "gpt_bigcode", "gpt_bigcode multi-head"],
}


@contextmanager
def masked_heads(model: Any, case: str, masks: list[Tensor] | None) -> Iterator[None]:
    """Heads scaled where they enter the output projection, which is the same as scaling their probabilities.

    transformers 4.57 reads no head_mask for MPT, and turns GPT-NeoX's into an additive mask that its eager attention
    then multiplies with. The files that this project takes for its reference multiply.
    """
    handles = []
    for layer, mask in enumerate(masks or ()):
        module = model.get_submodule(OUT_PROJECTIONS[family(case)].format(layer))
        head_dim = getattr(model.config, "head_dim", model.config.hidden_size // model.config.num_attention_heads)
        scales = mask.repeat_interleave(head_dim)
        handles.append(module.register_forward_pre_hook(lambda _, args, scales=scales: (args[0] * scales,)))
    yield
    for handle in handles:
        handle.remove()


def write_scenario(model: Any, case: str, scenario: Scenario, folder: Path) -> None:
    """The model, our calls, and what the reference makes of its own."""
    model.save_pretrained(folder)
    model.zero_grad()
    leaves = {name: scenario.theirs[-1][name].clone().requires_grad_() for name in scenario.grad_of}
    past: Any = None
    with masked_heads(model, case, scenario.head_masks):
        for call in scenario.theirs:
            out = model(**{**call, **leaves, **({} if past is None else {"past_key_values": past})})
            past = out.past_key_values
    (total_of(out, scenario.ours[-1]["attention_mask"]) if scenario.through_all else out.loss).backward()
    attentions = out.attentions
    if attentions and scenario.head_masks is not None:
        attentions = [a * mask[:, None, None] for a, mask in zip(attentions, scenario.head_masks, strict=True)]
    past = getattr(past, "self_attention_cache", past)
    cache = [(layer.keys, layer.values) for layer in past.layers] if scenario.ours[-1].get("use_cache") else None
    content = {
        "calls": scenario.ours,
        "grad_of": scenario.grad_of,
        "through_all": scenario.through_all,
        "logits": out.logits,
        "loss": out.loss,
        "hidden_states": out.hidden_states,
        "attentions": attentions,
        "cache": cache,
        "grads": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "inputs": {name: leaf.grad for name, leaf in leaves.items()},
    }
    torch.save(content, folder / "reference.pt")


def total_of(out: Any, mask: Tensor) -> Tensor:
    """Something that depends on all outputs at the tokens that are there."""
    states = sum((h * mask[:, :, None]).square().mean() for h in out.hidden_states)
    weights = sum((a * mask[:, None, :, None] * mask[:, None, None]).square().mean() for a in out.attentions)
    return out.loss + states + weights  # type: ignore[no-any-return]


def run(group: Group, folder: str) -> tuple[Decoder, dict[str, Any], CausalOutput]:
    """Our calls, and the backward of the last one's loss."""
    reference = torch.load(Path(folder) / "reference.pt", weights_only=False)
    model = load(folder, group=group)
    padded_model, past = PaddedModel(model), None
    last = reference["calls"][-1]
    for name in reference["grad_of"]:
        last[name] = last[name].clone().requires_grad_()
    for call in reference["calls"]:
        out = padded_model(**call, past_key_values=past)
        past = out.past_key_values
    assert out.loss is not None
    (total_of(out, last["attention_mask"]) if reference["through_all"] else out.loss).backward()
    return model, reference, out


def deviation(group: Group, folder: str) -> dict[str, float]:
    """This rank's errors, by what they were found in: relative to the largest value."""
    model, reference, out = run(group, folder)
    assert out.loss is not None
    call = reference["calls"][-1]
    time = reference["logits"].shape[1]
    whole = call.get("attention_mask")
    if whole is None or whole.dim() == 4:  # with four axes every column holds a token
        whole = torch.ones(len(reference["logits"]), time if whole is None else whole.shape[3], dtype=torch.long)
    here = whole[:, -time:, None]
    errors = {"logits": padded_error(out.logits, reference["logits"], here)}
    errors["loss"] = error(out.loss.detach(), reference["loss"].detach(), reference["loss"].detach())
    for name in ("attentions", "hidden_states", "past_key_values"):
        flag = {"attentions": "output_attentions", "hidden_states": "output_hidden_states"}.get(name, "use_cache")
        if flag in call:
            assert (getattr(out, name) is not None) == call[flag], name
    if call.get("output_hidden_states"):
        for i, (a, b) in enumerate(zip(out.hidden_states or (), reference["hidden_states"], strict=True)):
            errors[f"hidden state {i}"] = padded_error(a, b, here)
    if call.get("output_attentions"):
        seen = here[:, None] * whole[:, None, None]
        for i, (a, b) in enumerate(zip(out.attentions or (), reference["attentions"], strict=True)):
            errors[f"attention {i}"] = padded_error(a, b, seen)
    if call.get("use_cache"):
        errors |= cache_errors(model, out, reference["cache"], whole)
    return {**errors, **gradient_errors(model, reference["grads"]), **input_errors(call, reference)}


def padded_error(ours: Tensor, theirs: Tensor, here: Tensor) -> float:
    assert not bool((ours * (1 - here)).any()), "padding holds zeros"
    return error(ours.detach(), theirs.detach() * here, theirs.detach())


def cache_errors(model: Decoder, out: CausalOutput, cache: list[Any], whole: Tensor) -> dict[str, float]:
    errors = {}
    for layer, (kv, full) in enumerate(zip(out.past_key_values or (), cache, strict=True)):
        heads = model.heads(layer)
        own = slice(*heads.kv_range(heads.rank))
        for name, a, b in zip("kv", kv[:2], full, strict=True):
            if heads.n_local:
                errors[f"cache {layer} {name}"] = padded_error(a, b[:, own], whole[:, None, :, None])
    return errors


def gradient_errors(model: Decoder, grads: dict[str, Tensor]) -> dict[str, float]:
    names, errors = family_of(model.config.model_type).names, {}
    for ours, parameter in model.named_parameters():
        name, theirs = names.theirs(ours)
        assert (parameter.grad is None) == (theirs not in grads), ours
        if parameter.grad is None:
            continue
        full = grads[theirs].t() if name.transposed else grads[theirs]
        errors[f"grad {ours}"] = error(parameter.grad, rule_of(parameter).take(full, model.group.rank), full)
    return errors


def input_errors(call: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    return {
        f"grad {name}": error(call[name].grad, grad, grad) if grad is not None else 0.0
        for name, grad in reference["inputs"].items()
    }


def reference_model(case: str) -> Any:
    torch.manual_seed(hash_of(case))
    return MODELS[case]()
