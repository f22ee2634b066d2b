"""Every option of the five families as each transformers writes it: the same logits, bit for bit the same as from the
settings it was made of, and what is saved here is read by it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.outside.files.environments import ENVIRONMENTS, FIRST, Environment
from tests.outside.files.made import Made, check_logits, check_saved_here, make

GPT: dict[str, Any] = {"n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 97}
NEOX: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97,
    "max_position_embeddings": 64,
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": {**NEOX, "intermediate_size": 72},
    "gpt_neox_japanese": NEOX,
    "mpt": {"d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 97},
}
GPTS: list[dict[str, Any]] = [
    {}, {"n_inner": 40}, {"activation_function": "relu"}, {"scale_attn_weights": False}, {"layer_norm_epsilon": 0.1},
    {"tie_word_embeddings": False}, {"eos_token_id": [3, 4], "pad_token_id": 0, "bos_token_id": None},
    {"temperature": 0.7, "do_sample": True, "max_length": 30, "bad_words_ids": [[1]]},
    {"attn_pdrop": 0, "embd_pdrop": 0.0, "resid_pdrop": 1.0}, {"id2label": {"0": "a", "1": "b", "2": "c"}},
]  # fmt: skip
ROTARY: list[dict[str, Any]] = [
    {}, {"rotary_pct": 0.5, "rotary_emb_base": 500}, {"rotary_pct": 1.0, "rotary_emb_base": 25000.0},
    {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rotary_pct": 1.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"layer_norm_eps": 0.1},
    {"hidden_act": "gelu_fast"}, {"eos_token_id": [3, 4]}, {"attention_dropout": 1.0, "hidden_dropout": 1},
]  # fmt: skip
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "gpt2": [*GPTS, {"scale_attn_by_inverse_layer_idx": True}, {"reorder_and_upcast_attn": True}],
    "gpt_bigcode": [*GPTS, {"multi_query": False}, {"attention_softmax_in_fp32": False}],
    "gpt_neox": [
        *ROTARY, {"use_parallel_residual": False}, {"attention_bias": False}, {"tie_word_embeddings": True},
        {"classifier_dropout": 0.3},
    ],
    "gpt_neox_japanese": [*ROTARY, {"intermediate_multiple_size": 2}],
    "mpt": [
        {}, {"attn_config": {"clip_qkv": 0.5}}, {"attn_config": {"clip_qkv": 0}},
        {"attn_config": {"softmax_scale": 0.7}},
        {"tie_word_embeddings": False}, {"layer_norm_epsilon": 0.1}, {"attn_config": {"alibi": False}},
        {"attn_config": {"alibi_bias_max": 4, "qk_ln": True}}, {"no_bias": False, "logit_scale": 0.5},
        {"attn_config": {"attn_type": "multiquery_attention"}}, {"emb_pdrop": 0.5, "resid_pdrop": 1},
    ],
}  # fmt: skip
SPELLED: list[dict[str, Any]] = [
    {"rope_theta": 500, "rope_type": "default", "partial_rotary_factor": 0.5}, {"rope_theta": 500.0},
    {"type": "linear", "factor": 2.0, "rope_theta": 500}, {"partial_rotary_factor": 1.0},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500, "partial_rotary_factor": 1.0},
    {"rope_type": "linear", "factor": 2, "original_max_position_embeddings": 32},
]  # fmt: skip
"""As transformers 5 says them, in rope_parameters or in rope_scaling."""


def cases(environment: Environment) -> dict[str, dict[str, Any]]:
    found = {f"{family} {option}": {**BASES[family], **option} for family in BASES for option in OPTIONS[family]}
    for family in ("gpt_neox", "gpt_neox_japanese") if environment is not FIRST else ():
        for rope in SPELLED:
            found[f"{family} rope_parameters {rope}"] = {**BASES[family], "rope_parameters": rope}
            other = {"rope_scaling": rope, "rope_parameters": {"rope_theta": 7.0}, "rotary_pct": 0.25}
            found[f"{family} rope_scaling {rope}"] = {**BASES[family], **other}
        left = {"rotary_pct": 0.5, "rotary_emb_base": 500}
        found[f"{family} {left}, rest in rope_parameters"] = {**BASES[family], **left, "rope_parameters": {}}
    return {name: {"model_type": name.split()[0], "transformers_version": "5", **hf} for name, hf in found.items()}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_option_is_read_as_it_was_written_and_written_so_that_it_is_read(
    environment: Environment, tmp_path_factory: pytest.TempPathFactory
) -> None:
    configs = cases(environment)
    made: Made = make(environment, tmp_path_factory.mktemp("options"), configs)
    for name in configs:
        check_logits(made, name)
        check_saved_here(made, name)
