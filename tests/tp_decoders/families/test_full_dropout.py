"""A dropout of exactly 1.0: loads, is evaluated as if it were not there, and trains as transformers does with it, which
is a formula without chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from parallel.attention.forward_pass import Pass
from parallel.layers.dropout import Dropping, token_keys
from tests.tp_decoders.families.dense_mpt import random_weight
from tp_decoders import load
from tp_decoders.registry import family_of

TOKENS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
GPT = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32, "vocab_size": 31}
NEOX = {
    "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 31, "rotary_pct": 0.5,
    "max_position_embeddings": 32,
}  # fmt: skip
NONE_GPT, NONE_NEOX = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}, {"attention_dropout": 0}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {**GPT, **NONE_GPT, key: 1.0}) for name in ("GPT2", "GPTBigCode") for key in NONE_GPT),
    *(("GPTNeoX", {**NEOX, "intermediate_size": 40, key: 1.0}) for key in ("attention_dropout", "hidden_dropout")),
    *(("GPTNeoXJapanese", {**NEOX, **NONE_NEOX, key: 1.0}) for key in ("attention_dropout", "hidden_dropout")),
    ("Llama", {**NEOX, "intermediate_size": 40, "num_key_value_heads": 1, "attention_dropout": 1.0}),
    ("Mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 31, "attn_config": {"attn_pdrop": 1.0}}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_it_trains_and_evaluates_as_in_transformers(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")(**options)
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for key, parameter in reference.named_parameters():
        parameter.data = random_weight(key, tuple(parameter.shape))
    reference.save_pretrained(tmp_path)
    model = load(tmp_path)
    names = family_of(model.config.model_type).names
    for train in (False, True):
        dropping = Dropping(7, token_keys([0], [len(TOKENS)])) if train else None
        reference.train(train).zero_grad()
        wanted = reference(TOKENS[None]).logits[0]
        model.zero_grad()
        got = model(TOKENS, Pass.packed([len(TOKENS)], dropping=dropping))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        wanted.square().mean().backward()
        got.square().mean().backward()
        theirs = dict(reference.named_parameters())
        for ours, parameter in model.named_parameters():
            found, stored = names.theirs(ours)
            grad = theirs[stored].grad
            expected = torch.zeros(theirs[stored].shape) if grad is None else grad
            given = torch.zeros(parameter.shape) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(given.t() if found.transposed else given, expected, rtol=1e-3, atol=1e-4)
