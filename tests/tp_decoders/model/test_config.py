"""config.json is read strictly: real files of the families pass, and every option that is not supported is named."""

from __future__ import annotations

import json
import typing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from parallel.attention.forward_pass import Pass
from parallel.errors import ConfigError
from parallel.layers.dropout import Dropping, token_keys
from parallel.ranks.group import Group
from tp_decoders import build
from tp_decoders.checkpoint.load_save import initialise
from tp_decoders.model.config import DecoderConfig, Dropout
from tp_decoders.registry import FAMILIES, config_from_hf, read_config

CLASSES: dict[str, typing.Any] = {
    name: getattr(transformers, f"{family.types[name]}Config") for name, family in FAMILIES.items()
} | {"mistral": partial(transformers.MistralConfig, sliding_window=None)}

# Files as they are published with the models (shortened where values repeat nothing of interest).
PUBLISHED: dict[str, dict[str, typing.Any]] = {
    "openai gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "gpt-neox-20b": {
        "architectures": ["GPTNeoXForCausalLM"], "attention_probs_dropout_prob": 0, "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu_fast", "hidden_dropout_prob": 0, "hidden_size": 6144, "initializer_range": 0.02,
        "intermediate_size": 24576, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox",
        "num_attention_heads": 64, "num_hidden_layers": 44, "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.19.0.dev0",
        "use_cache": True,
        "vocab_size": 50432,
    },
    "mpt-7b": {
        "architectures": ["MPTForCausalLM"], "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
        "attn_config": {
            "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
            "attn_type": "multihead_attention",
            "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
        },
        "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4, "init_config": {"verbose": 0},
        "init_device": "cpu", "learned_pos_emb": True, "logit_scale": None, "max_seq_len": 2048, "model_type": "mpt",
        "n_heads": 32, "n_layers": 32, "no_bias": True, "norm_type": "low_precision_layernorm", "resid_pdrop": 0,
        "tokenizer_name": "EleutherAI/gpt-neox-20b", "torch_dtype": "bfloat16", "use_cache": False, "verbose": 0,
        "vocab_size": 50432,
    },
    "starcoder": {
        "activation_function": "gelu", "architectures": ["GPTBigCodeForCausalLM"], "attention_softmax_in_fp32": True,
        "attn_pdrop": 0.1, "bos_token_id": 0, "embd_pdrop": 0.1, "eos_token_id": 0, "inference_runner": 0,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "max_batch_size": None, "max_sequence_length": None,
        "model_type": "gpt_bigcode", "multi_query": True, "n_embd": 6144, "n_head": 48, "n_inner": 24576, "n_layer": 40,
        "n_positions": 8192, "pad_key_length": True, "pre_allocate_kv_cache": False, "resid_pdrop": 0.1,
        "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True,
        "torch_dtype": "float32", "use_cache": True, "validate_runner_input": True, "vocab_size": 49152,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood_and_agree_with_transformers(name: str) -> None:
    hf = PUBLISHED[name]
    config = config_from_hf(hf)
    theirs = CLASSES[str(hf["model_type"])](**hf)
    assert (config.n_layers, config.n_heads, config.d_model, config.vocab_size, config.tie) == (
        theirs.num_hidden_layers, theirs.num_attention_heads, theirs.hidden_size, theirs.vocab_size,
        theirs.tie_word_embeddings,
    )  # fmt: skip
    build(config, Group(3, 8), device="meta")


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_of_a_bare_config_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """A key that is left out means what it means to transformers; every key that transformers writes is understood."""
    CLASSES[family]().save_pretrained(tmp_path)
    spelled_out = read_config(tmp_path)
    everything = config_from_hf(json.loads(json.dumps(CLASSES[family]().to_dict())))
    bare = config_from_hf(BASES[family])
    assert spelled_out == everything == bare


BASES: dict[str, dict[str, typing.Any]] = {family: {"model_type": family} for family in FAMILIES}
BASES["mistral"]["sliding_window"] = None  # else 4096 positions of its 131072


@pytest.mark.parametrize(
    ("family", "option", "said"),
    [
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("gpt_neox", {"add_cross_attention": True}, "add_cross_attention = True is not supported; accepted: False"),
        ("gpt2", {"is_encoder_decoder": True}, "is_encoder_decoder = True"),
        ("gpt_neox", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("gpt2", {"n_layer": "12"}, "n_layer = '12' is not supported; accepted: an integer of at least 1"),
        ("gpt2", {"n_layer": 0}, "n_layer = 0"),
        ("gpt2", {"n_layer": True}, "n_layer = True"),
        ("gpt2", {"n_head": 7}, "width 768 does not divide into 7 heads"),
        ("gpt2", {"scale_attn_weights": 1}, "scale_attn_weights = 1 is not supported; accepted: true or false"),
        ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon = 0 is not supported; accepted: a number above 0"),
        ("gpt2", {"resid_pdrop": 1.5}, "resid_pdrop = 1.5 is not supported; accepted: a number from 0.0 to 1.0"),
        ("gpt2", {"activation_function": "gelu_9"}, "activation 'gelu_9' is unknown; choose one of"),
        ("gpt2", {"n_embd": 768, "hidden_size": 512}, "disagree"),
        ("gpt_neox", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        "rope_type = 'longrope' is not supported; accepted: "),
        ("gpt_neox", {"rope_scaling": {"type": "linear"}}, "has no 'factor'"),
        ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor = 0.5"),
        ("gpt_neox", {"rope_scaling": "linear"}, "rope_scaling should be a JSON object"),
        ("gpt_neox", {"rotary_pct": 0.27}, "rotates 25 elements; they turn in pairs"),
        ("gpt_neox", {"rotary_emb_base": 10000, "rope_theta": 500}, "disagree"),
        ("gpt_neox_japanese", {"intermediate_multiple_size": 0}, "intermediate_multiple_size"),
        ("mpt", {"attn_config": {"prefix_lm": True}},
        "attn_config: prefix_lm = True is not supported; accepted: False"),
        ("mpt", {"attn_config": {"attn_uses_sequence_id": True}}, "attn_uses_sequence_id = True"),
        ("mpt", {"attn_config": {"attn_type": "grouped_query_attention"}}, "attn_type = 'grouped_query_attention'"),
        ("mpt", {"attn_config": {"rope": True}}, "rope = True"),
        ("mpt", {"attn_config": {"sliding_window_size": 128}}, "sliding_window_size = 128"),
        ("mpt", {"logit_scale": "sqrt"}, "logit_scale = 'sqrt' is not supported; accepted: inv_sqrt_d_model"),
        ("mpt", {"norm_type": "rmsnorm"}, "norm_type = 'rmsnorm'"),
        ("mpt", {"embedding_fraction": 0.5}, "embedding_fraction = 0.5"),
        ("mpt", {"expansion_ratio": 1.3}, "no whole number of columns"),
        ("mpt", {"ffn_config": {"ffn_type": "mptgeglu"}}, "ffn_type = 'mptgeglu'"),
        ("gpt_bigcode", {"num_key_value_heads": 4}, "num_key_value_heads = 4 is not supported; accepted: 1"),
        ("gpt_bigcode", {"multi_query": None}, "multi_query = None"),
        ("gpt_bigcode", {"add_cross_attention": True}, "cross-attention with multi_query = false only"),
        ("gpt2", {"pruned_heads": {"12": [1]}}, "pruned heads of layer 12"),
        ("gpt2", {"pruned_heads": {"0": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]}}, "one must be left"),
        ("gpt2", {"pruned_heads": {"0": [12]}}, "heads are numbered 0 to"),
        ("gpt2", {"pruned_heads": {"first": [1]}}, "an object of layer numbers"),
        ("gpt2", {"pruned_heads": {"0": [True]}}, "lists of head numbers"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3 is not supported; accepted: a divisor of"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported; accepted: 1.0"),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type = 'longrope'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0}}, "has no 'original_max_position_embeddings'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0,
        "high_freq_factor": 4.0}}, "high_freq_factor = 4.0 is not supported; accepted: a number above"),
        ("mistral", {"sliding_window": 4096}, "sliding_window = 4096 in 32 of 32 layers, for a context of 131072"),
        ("qwen2", {"use_sliding_window": True}, "sliding_window = 4096 in 4 of 32 layers, for a context of 32768"),
        ("qwen3", {"use_sliding_window": True, "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"]}, "sliding_window = 4096 in 1 of 2 layers"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 32}, "needs use_sliding_window = true"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_an_error_that_names_it(family: str, option: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_hf({**BASES[family], **option})
    assert said in str(caught.value)


UNREAD: list[tuple[str, dict[str, typing.Any], list[str]]] = [
    ("gpt2", {"rotary_pct": 0.5, "n_special": 0}, ["n_special", "rotary_pct"]),
    ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}}, ["rope_scaling.beta_fast"]),
    ("gpt_neox", {"hidden_dropout_prob": 0.1}, ["hidden_dropout_prob"]),
    ("gpt_neox_japanese", {"use_parallel_residual": True}, ["use_parallel_residual"]),
    ("mpt", {"attn_config": {"novelty": 1}, "ffn_config": {"ffn_type": "mptmlp", "moe": 2}, "zoo": []},
    ["attn_config.novelty", "ffn_config.moe", "zoo"]),
    ("gpt_bigcode", {"forged\nline": 1, "future_option": {"deep": [1]}}, ["'forged\\nline'", "future_option"]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "option", "named"), UNREAD)
def test_keys_that_nobody_knows_are_named_in_one_warning_and_change_nothing(
    family: str, option: dict[str, object], named: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    known = {key: value for key, value in option.items() if key == "rope_scaling"}
    assert replace(config_from_hf({**BASES[family], **option})) == config_from_hf(
        {**BASES[family], **{key: {"type": "linear", "factor": 2.0} for key in known}}
    )
    (line,) = [record.getMessage() for record in caplog.records if "not read" in record.getMessage()]
    assert "\n" not in line and line.split(": ")[1] == ", ".join(named)


@pytest.mark.parametrize(("family", "option", "named"), UNREAD)
def test_our_own_presets_are_read_strictly(family: str, option: dict[str, object], named: list[str]) -> None:
    with pytest.raises(ConfigError, match="not an option this project knows; it accepts") as caught:
        config_from_hf({**BASES[family], **option}, unread="refuse")
    assert ", ".join(named) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("GPT2LMHeadModel", "gpt2"),
        ("GPT2DoubleHeadsModel", "gpt2"),
        ("GPTNeoXForCausalLM", "gpt_neox"),
        ("GPTNeoXModel", "gpt_neox"),
        ("GPTNeoXJapaneseForCausalLM", "gpt_neox_japanese"),
        ("MPTForCausalLM", "mpt"),
        ("MptForTokenClassification", "mpt"),
        ("GPTBigCodeForCausalLM", "gpt_bigcode"),
        ("LlamaForCausalLM", "llama"),
        ("Qwen3ForCausalLM", "qwen3"),
    ],
)
def test_without_a_model_type_the_class_tells_the_family(name: str, family: str) -> None:
    given = {key: value for key, value in BASES[family].items() if key != "model_type"}
    config = config_from_hf({**given, "architectures": [name]})
    assert config.model_type == config.hf["model_type"] == family
    for other in ("GPTNeoForCausalLM", "GPT2LMHeadCustomModel", 7, None):
        with pytest.raises(ConfigError, match="model_type None is not one of"):
            config_from_hf({**given, "architectures": [other]})


def test_unknown_model_type_lists_the_families(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    with pytest.raises(
        ConfigError,
        match=r"'gemma' is not one of .*: gpt2, gpt_bigcode, gpt_neox, gpt_neox_japanese, llama, mistral, mpt, qwen",
    ):
        read_config(tmp_path)


def test_train_mode_with_dropout_but_without_masks_is_refused_and_without_dropout_allowed() -> None:
    config = config_from_hf({"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 5})
    model, tokens = initialise(build(config), seed=0), torch.zeros(3, dtype=torch.long)
    assert not model.training
    with pytest.raises(ConfigError, match="the pass says no masks: dropout is not left out silently"):
        model.train()(tokens, Pass.packed([3]))
    keys = token_keys([0], [3])
    one, two = (model(tokens, Pass.packed([3], dropping=Dropping(seed, keys))) for seed in (1, 2))
    assert not torch.equal(one, two)
    plain = initialise(build(replace(config, dropout=Dropout())), seed=0)
    assert torch.equal(plain.train()(tokens, Pass.packed([3])), model.eval()(tokens, Pass.packed([3])))


def test_learned_positions_and_alibi_of_mpt() -> None:
    def of(**attn: object) -> DecoderConfig:
        return config_from_hf({"model_type": "mpt", "attn_config": attn})

    assert (of().options.alibi_bias_max, of().positions) == (8.0, "alibi")
    assert (of(alibi=False).options.alibi_bias_max, of(alibi=False).positions) == (None, "learned")
