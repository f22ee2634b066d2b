"""The oracle of cross-attention: transformers' GPT-2, saved as itself or laid out as a GPT-BigCode, and what it
computes for a call, whole or in two parts through its cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tp_decoders.families.parity import GPT2, hf
from tests.tp_decoders.padded.padded_cases import (
    BATCH,
    QUIET,
    STATES,
    TIME,
    WATCHED,
    batch_ids,
    generate_positions,
    labels_for,
    masks,
    without_firsts,
)

WIDTH, HEADS = 24, 4
CASES = {
    "gpt2": hf("GPT2", GPT2, add_cross_attention=True),
    "gpt2 upcast": hf(
        "GPT2", GPT2, add_cross_attention=True, reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt_bigcode": hf("GPT2", GPT2, add_cross_attention=True),
}


def encoder_states() -> Tensor:
    return torch.randn(BATCH, STATES, WIDTH, generator=torch.Generator().manual_seed(3))


def encoder_masks() -> dict[str, Tensor | None]:
    by_state = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 1, 1, 0]])
    by_token = (torch.rand(BATCH, TIME, STATES, generator=torch.Generator().manual_seed(4)) < 0.6).long()
    by_token[:, :, 2] = 1
    return {"no": None, "states": by_state, "tokens": by_token}


def call(encoder: str, side: str, **extra: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ours and the reference are given."""
    ids, mask = batch_ids(), masks()[side]
    labels = labels_for(ids, mask)
    states = {"encoder_hidden_states": encoder_states(), "encoder_attention_mask": encoder_masks()[encoder]}
    ours: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels, **states, **extra}
    theirs = {**ours, "labels": without_firsts(labels, mask)}
    return ours, {**theirs, "position_ids": generate_positions(mask)} if side == "left" else theirs


HEAD_MASK = torch.tensor([[0.0, 1.0, 0.3, 2.0], [1.0, 0.5, 0.0, 1.0]])
CALLS = {
    "no masks": lambda: call("no", "right", **QUIET),
    "encoder_attention_mask by state, left padding": lambda: call("states", "left", **WATCHED),
    "encoder_attention_mask by token, right padding": lambda: call("tokens", "right", **WATCHED),
    "head_mask": lambda: call("states", "left", head_mask=HEAD_MASK, **WATCHED),
}


def write(case: str, folder: Path, model: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """The checkpoint, and how the oracle's tensors become the checkpoint's."""
    model.save_pretrained(folder)
    if case != "gpt_bigcode":
        return lambda tensors: tensors
    path = folder / "config.json"
    hf_config = {**json.loads(path.read_text()), "model_type": "gpt_bigcode", "multi_query": False}
    hf_config |= {"activation_function": "gelu_pytorch_tanh", "architectures": ["GPTBigCodeForCausalLM"]}
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        del hf_config[key]
    path.write_text(json.dumps(hf_config))
    save_file(as_bigcode(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return as_bigcode


def as_bigcode(tensors: dict[str, Tensor], heads: int = HEADS) -> dict[str, Tensor]:
    """GPT-2's tensors laid out as GPT-BigCode's: [out, in], and rows of c_attn head by head."""
    made, width = {}, next(tensor.shape[1] for name, tensor in tensors.items() if name.endswith("wte.weight"))
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and name.endswith(("c_attn.weight", "c_proj.weight", "q_attn.weight", "c_fc.weight")):
            tensor = tensor.t()
        if ".c_attn." in name:
            rows = tensor.unflatten(0, (-1, heads, width // heads))
            tensor = rows.transpose(0, 1).flatten(0, 2)
        made[name] = tensor.contiguous()
    return made


def reference(case: str, folder: Path, ours: dict[str, Any], theirs: dict[str, Any], parts: int = 1) -> None:
    """The model and what the oracle makes of the call, whole or in parts through its cache."""
    torch.manual_seed(2)
    model = CASES[case]()
    layout = write(case, folder, model)
    states = theirs["encoder_hidden_states"].clone().requires_grad_()
    past: Any = None
    for one in split(theirs, parts):
        out = model(**{**one, "encoder_hidden_states": states, "past_key_values": past})
        past = out.past_key_values
    out.loss.backward()
    grads = layout({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    content = {
        "calls": split(ours, parts),
        "grads": grads,
        "states": states.grad,
        **{name: getattr(out, name) for name in ("logits", "loss", "attentions", "cross_attentions", "hidden_states")},
    }
    if theirs.get("use_cache"):
        content["cross"] = [(layer.keys, layer.values) for layer in past.cross_attention_cache.layers]
    torch.save(content, folder / "reference.pt")


def split(whole: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """The call in one, or in two at column 4."""
    if parts == 1:
        return [whole]
    calls = []
    for columns in (slice(0, 4), slice(4, None)):
        one = {**whole, "attention_mask": whole["attention_mask"][:, : columns.stop], "use_cache": True}
        for name in ("input_ids", "labels", "position_ids"):
            if name in whole:
                one[name] = whole[name][:, columns]
        if one["encoder_attention_mask"] is not None and one["encoder_attention_mask"].dim() == 3:
            one["encoder_attention_mask"] = one["encoder_attention_mask"][:, columns]
        calls.append(one)
    return calls
