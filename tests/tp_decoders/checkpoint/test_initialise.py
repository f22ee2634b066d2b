"""Fresh weights: each family's own rule, as transformers draws them; one set of full tensors at every parallel size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from parallel.ranks.group import Group
from parallel.sharding.rules import rule_of
from tp_decoders.checkpoint.load_save import build, initialise
from tp_decoders.registry import config_from_hf, family_of

LAYERS = 8
GPT2 = {"vocab_size": 211, "n_positions": 64, "n_embd": 96, "n_layer": LAYERS, "n_head": 6}
NEOX = {
    "vocab_size": 211, "hidden_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 6,
    "max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {**GPT2, "tie_word_embeddings": False}),
    "gpt_neox": ("GPTNeoX", {**NEOX, "intermediate_size": 384, "initializer_range": 0.05}),
    "gpt_neox_japanese": ("GPTNeoXJapanese", NEOX),
    "mpt": ("Mpt", {"vocab_size": 211, "d_model": 96, "n_heads": 6, "n_layers": LAYERS, "max_seq_len": 64}),
    "gpt_bigcode": ("GPTBigCode", GPT2),
    "llama": ("Llama", {**NEOX, "num_key_value_heads": 2, "intermediate_size": 160}),
}


@pytest.mark.parametrize("family", CASES)
def test_every_tensor_has_the_spread_that_transformers_gives_it(family: str) -> None:
    name, options = CASES[family]
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**options))
    state = theirs.state_dict()
    ours = initialise(build(config_from_hf(theirs.config.to_dict())), seed=1)
    names = family_of(family).names
    for key, parameter in ours.named_parameters():
        wanted = state[names.theirs(key)[1]]
        assert float(parameter.std(correction=0)) == pytest.approx(float(wanted.std(correction=0)), rel=0.1), key
        assert float(parameter.mean()) == pytest.approx(float(wanted.mean()), abs=0.01), key
    if family in ("gpt2", "gpt_bigcode"):
        down = dict(ours.named_parameters())["blocks.3.down.weight"]
        assert float(down.std()) == pytest.approx(0.02 / (2 * LAYERS) ** 0.5, rel=0.05)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("family", CASES)
def test_the_full_tensors_are_the_same_at_every_size(family: str, size: int) -> None:
    name, options = CASES[family]
    config = config_from_hf(getattr(transformers, f"{name}Config")(**options).to_dict())
    whole = dict(initialise(build(config), seed=1).named_parameters())
    shards = [dict(initialise(build(config, Group(rank, size)), seed=1).named_parameters()) for rank in range(size)]
    for key, parameter in whole.items():
        joined = rule_of(shards[0][key]).join([shard[key] for shard in shards])
        assert torch.equal(joined, parameter), key
    other = dict(initialise(build(config), seed=2).named_parameters())
    assert not torch.equal(other["embed.weight"], whole["embed.weight"])
