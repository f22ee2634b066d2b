"""What transformers makes of a drawn padded call, saved for the ranks; and how far theirs is from it: outputs, loss,
every gradient, the cache. Its own class, or its GPT-2 laid out as a GPT-BigCode where that family's cross-attention is
wanted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel.ranks.group import Group
from parallel.sharding.rules import rule_of
from tests.tp_decoders.families.dense_mpt import random_weight
from tests.tp_decoders.fuzz.drawn import CLASSES, in_float64
from tests.tp_decoders.fuzz.drawn_calls import CAUSAL, DrawnCall, class_name, heads_of, scenario_of
from tests.tp_decoders.model.cross_cases import as_bigcode
from tests.tp_decoders.padded.padded_cases import Scenario, cache_errors, masked_heads
from tp_decoders import load
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.task_config import SEQUENCES
from tp_decoders.padded.padded_model import PaddedModel
from tp_decoders.padded.padded_tasks import PaddedTask
from tp_decoders.registry import family_of

NOTHING = 1e-6
"""0 but for rounding: the distance from it is taken as it is."""
OUTPUTS = ("logits", "start_logits", "end_logits")
Layout = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def reference_of(drawn: DrawnCall) -> Any:
    """transformers' model with random weights, pruned where drawn so."""
    torch.manual_seed(drawn.model.seed)
    family, options = drawn.family, dict(drawn.model.config)
    if drawn.crossing:
        options["add_cross_attention"] = True
        if family == "gpt_bigcode":  # its own cross-attention fails in transformers 4.57
            family = "gpt2"
            for flag in ("multi_query", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):
                options.pop(flag, None)
    options |= {"pad_token_id": 0, "num_labels": 3}
    config = getattr(transformers, f"{CLASSES.get(family, 'Mpt')}Config")(**options)
    config._attn_implementation = "eager"
    model = getattr(transformers, class_name(family, drawn.task))(config).eval()
    for key, parameter in model.named_parameters():
        parameter.data = random_weight(key, tuple(parameter.shape))
    if drawn.pruned:
        model.prune_heads({layer: list(gone) for layer, gone in drawn.pruned})
    return model


def layout_of(drawn: DrawnCall) -> Any:
    """How the reference's tensors become the checkpoint's."""
    if drawn.family != "gpt_bigcode" or not drawn.crossing:
        return None
    heads = heads_of(drawn.model)
    return lambda tensors: as_bigcode(tensors, heads)


def write_call(drawn: DrawnCall, folder: Path) -> None:
    """The model's checkpoint, our calls, and what the reference makes of its own."""
    model, scenario, layout = reference_of(drawn), scenario_of(drawn), layout_of(drawn)
    model.save_pretrained(folder)
    if layout is not None:
        _as_bigcode(folder, layout)
    content = {"calls": scenario.ours, "grad_of": scenario.grad_of, "task": drawn.task}
    torch.save({**content, **answers(model, drawn, scenario, layout)}, folder / "reference.pt")


def _as_bigcode(folder: Path, layout: Layout) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), "model_type": "gpt_bigcode", "multi_query": False}
    config |= {"architectures": ["GPTBigCodeForCausalLM"]}
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        config.pop(key, None)
    path.write_text(json.dumps(config))
    save_file(layout(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def answers(model: Any, drawn: DrawnCall, scenario: Scenario, layout: Layout | None) -> dict[str, Any]:
    """Of the last call, after the others have filled its cache."""
    model.zero_grad()
    leaves = {name: scenario.theirs[-1][name].clone().requires_grad_() for name in scenario.grad_of}
    past: Any = None
    with masked_heads(model, drawn.family, scenario.head_masks):
        for number, call in enumerate(scenario.theirs, 1):
            watched = leaves if number == len(scenario.theirs) else {}
            out = model(**{**call, **watched, **({} if past is None else {"past_key_values": past})})
            past = out.get("past_key_values")
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    attentions = out.get("attentions")
    if attentions and scenario.head_masks is not None:
        attentions = [a * mask[:, None, None] for a, mask in zip(attentions, scenario.head_masks, strict=True)]
    found = {name: out.get(name) for name in (*OUTPUTS, "loss", "hidden_states", "cross_attentions")}
    own = getattr(past, "self_attention_cache", past)
    return {
        **{name: value for name, value in found.items() if value is not None},
        "attentions": attentions,
        "cache": None if own is None else [(layer.keys, layer.values) for layer in own.layers],
        "grads": layout(grads) if layout else grads,
        "inputs": {name: leaf.grad for name, leaf in leaves.items()},
    }


def noise_of(drawn: DrawnCall) -> dict[str, float]:
    """How far the reference's own float32 is from its float64, by what it is found in. (Its MPT has no float64.)"""
    if drawn.family == "mpt":
        return {}
    scenario, layout = scenario_of(drawn), layout_of(drawn)
    narrow = answers(reference_of(drawn), drawn, scenario, layout)
    for call in scenario.theirs:
        call |= {k: v.double() for k, v in call.items() if isinstance(v, Tensor) and v.is_floating_point()}
    model = in_float64(reference_of(drawn), drawn.model)  # drawn in the type that its weights were drawn in
    with all_in_float64():
        wide = answers(model, drawn, scenario, layout)
    flat_narrow, flat_wide = _flat(narrow), _flat(wide)
    return {name: distance(flat_narrow[name], flat_wide[name]) for name in flat_wide}


@contextmanager
def all_in_float64() -> Iterator[None]:
    """Masks are made in the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _flat(found: dict[str, Any]) -> dict[str, Tensor]:
    flat = {name: found[name].detach() for name in (*OUTPUTS, "loss") if name in found}
    flat |= {f"hidden state {i}": x.detach() for i, x in enumerate(found.get("hidden_states") or ())}
    flat |= {f"attention {i}": x.detach() for i, x in enumerate(found.get("attentions") or ())}
    flat |= {f"cross attention {i}": x.detach() for i, x in enumerate(found.get("cross_attentions") or ())}
    return flat | {f"grad {name}": grad for name, grad in found["grads"].items()}


def distance(ours: Tensor, theirs: Tensor, whole: Tensor | None = None) -> float:
    """Relative to the largest value, where that is one."""
    if not ours.numel():
        return 0.0
    largest = float((theirs if whole is None else whole).detach().abs().max())
    return float((ours.detach() - theirs.detach()).abs().max()) / (largest if largest > NOTHING else 1.0)


def call_deviation(group: Group, folder: str) -> dict[str, float]:
    """This rank's errors, by what they were found in; gradients by the reference's names."""
    reference = torch.load(Path(folder) / "reference.pt", weights_only=False)
    calls, task = reference["calls"], reference["task"]
    model = load(folder, group=group, task=task)
    for name in reference["grad_of"]:
        calls[-1][name] = calls[-1][name].clone().requires_grad_()
    past: Any = None
    for call in calls:
        caller: Any = PaddedModel(model) if task == CAUSAL else PaddedTask(model)
        out = caller(**call, **({} if past is None else {"past_key_values": past}))
        past = out.past_key_values
    out.loss.backward()
    errors = {"loss": distance(out.loss, reference["loss"])}
    errors |= _outputs(model, out, calls[-1], reference)
    errors |= _gradients(model, reference["grads"])
    return errors | {
        f"grad of {name}": distance(calls[-1][name].grad, grad)
        for name, grad in reference["inputs"].items() if grad is not None
    }  # fmt: skip


def _outputs(model: Decoder, out: Any, call: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    first = next(call[name] for name in ("input_ids", "inputs_embeds") if name in call)
    time, mask = first.shape[1], call.get("attention_mask")
    columns = time if reference["cache"] is None else reference["cache"][0][0].shape[2]
    whole = torch.ones(len(first), columns, dtype=torch.long) if mask is None else mask
    here, errors = whole[:, -time:, None], {}
    for name in OUTPUTS:
        if name in reference:
            theirs = reference[name]
            shown = torch.ones(()) if name != "logits" or reference["task"] == SEQUENCES else here
            errors[name] = distance(getattr(out, name) * shown, theirs * shown)
    for i, theirs in enumerate(reference.get("hidden_states") or ()):
        errors[f"hidden state {i}"] = distance(out.hidden_states[i], theirs * here)
    for i, theirs in enumerate(reference["attentions"] or ()):
        errors[f"attention {i}"] = distance(out.attentions[i], theirs * here[:, None] * whole[:, None, None])
    for i, theirs in enumerate(reference.get("cross_attentions") or ()):
        errors[f"cross attention {i}"] = distance(out.cross_attentions[i], theirs * here[:, None])
    if call.get("use_cache", True) and reference["cache"] is not None:
        errors |= cache_errors(model, out, reference["cache"], whole)
    for name, flag in (("attentions", "output_attentions"), ("hidden_states", "output_hidden_states")):
        assert bool(getattr(out, name)) == call.get(flag, False), name
    return errors


def _gradients(model: Decoder, grads: dict[str, Tensor]) -> dict[str, float]:
    names, errors = family_of(model.config.model_type).names, {}
    for ours, parameter in model.named_parameters():
        name, theirs = names.theirs(ours)
        if theirs not in grads:
            assert parameter.grad is None or not parameter.grad.any(), f"{ours} has a gradient"
            continue
        full = grads[theirs].t() if name.transposed else grads[theirs]
        assert parameter.grad is not None, f"{ours} has no gradient"
        errors[f"grad {theirs}"] = distance(parameter.grad, rule_of(parameter).take(full, model.group.rank), full)
    return errors
