"""MPT's options, and whose meaning they have: llm-foundry's, who made the format, or that of transformers' own MPT.

transformers reads many options without heeding them (IGNORED): to it every MPT has ALiBi of bias_max 8, no biases, no
norm of queries and keys, an own key and value for each head, an MLP 4 times as wide and logits as they come, and
attn_pdrop is what attention, residual and MLP are dropped by. So a file of such options means two models. Which one
follows from who wrote it (`reference_of`); `mpt_reference` in the file, or wherever a model is read, decides otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from parallel.errors import ConfigError
from tp_decoders.families.family import AUTO
from tp_decoders.files.json_fields import MOST_LAYERS, MOST_RATIO, Fields, shown
from tp_decoders.model.config import DecoderConfig, Dropout, head_size, probability

TRANSFORMERS, FOUNDRY = "transformers", "llm-foundry"
REFERENCES = (AUTO, TRANSFORMERS, FOUNDRY)
REFERENCE = "mpt_reference"
IGNORED: dict[str, tuple[Any, ...]] = {
    "attn_config.alibi": (True,),
    "attn_config.alibi_bias_max": (8,),
    "attn_config.attn_type": ("multihead_attention",),
    "attn_config.kv_n_heads": (None,),
    "attn_config.qk_ln": (False,),
    "attn_config.qk_gn": (False,),
    "attn_config.prefix_lm": (False,),
    "attn_config.attn_uses_sequence_id": (False,),
    "attn_config.rope": (False,),
    "attn_config.nope": (False,),
    "attn_config.sliding_window_size": (-1, None),
    "attn_config.attn_logit_softcapping": (None,),
    "attn_config.attn_pdrop": (0, None),
    "no_bias": (True,),
    "logit_scale": (None,),
    "expansion_ratio": (4,),
    "embedding_fraction": (1,),
    "norm_eps": (1e-5, None),
    "resid_pdrop": (0, None),
    "emb_pdrop": (0, None),
    "ffn_config": (None, {}, {"ffn_type": "mptmlp"}),
    "block_overrides": (None,),
    "final_logit_softcapping": (None,),
}
"""What the two read differently, with the values at which they agree."""
FOUNDRY_ONLY = frozenset(
    """
    ffn_config fc_type init_config use_pad_tok_in_ffn block_overrides final_logit_softcapping norm_eps tokenizer_name
    attn_config.qk_gn attn_config.fused_qkv attn_config.rope attn_config.nope attn_config.rope_theta
    attn_config.rope_impl attn_config.sliding_window_size attn_config.attn_logit_softcapping attn_config.kv_n_heads
    attn_config.kv_dim attn_config.attn_temperature_tuning
    """.split()  # noqa: SIM905
)
"""Keys that transformers' own MPT never wrote."""
HARMLESS = ("init_config", "init_device", "verbose", "fc_type", "use_pad_tok_in_ffn", "layer_norm_epsilon", REFERENCE)
ATTENTION_HARMLESS = ("rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config", "tie_word_embeddings")
"""Details of a rotary embedding that is off, and what transformers writes into every nested config."""
ACTIVATIONS = ("gelu", "relu", "relu6", "silu", "mish", "leaky_relu", "sigmoid", "tanh")
"""Of torch.nn.functional, which llm-foundry names them by."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """`alibi_bias_max` is None where ALiBi is off."""

    alibi_bias_max: float | None
    bias: bool
    clip_qkv: float | None
    softmax_scale: float
    qk_norm: bool
    logit_scale: float


def from_hf(fields: Fields) -> DecoderConfig:
    reference, differing = reference_of(fields.values), differences(fields.values)
    fields.choice(REFERENCE, AUTO, REFERENCES)
    config = (_as_foundry if reference == FOUNDRY else _as_transformers)(fields)
    if not differing:
        return config
    fields.remarks.append(_remark(fields, reference, differing))
    return replace(config, hf={**fields.values, REFERENCE: reference})  # it stays so when it is saved


def reference_of(hf: Mapping[str, Any]) -> str:
    """Whose meaning a file's options have: TRANSFORMERS or FOUNDRY.

    The class that wrote it, where it says so: Mpt... is transformers', MPT... llm-foundry's. Else llm-foundry's code
    beside it or keys that only llm-foundry writes; else transformers', if it gave its version. What nobody wrote is
    read as the format's maker means it.
    """
    given = hf.get(REFERENCE)
    if given in (TRANSFORMERS, FOUNDRY):
        return str(given)
    named = hf.get("architectures")
    made_by = str(named[0]) if isinstance(named, list) and named else ""
    if made_by.startswith("Mpt"):
        return TRANSFORMERS
    if made_by.startswith("MPT") or hf.get("auto_map") or FOUNDRY_ONLY & _flat(hf).keys():
        return FOUNDRY
    return TRANSFORMERS if hf.get("transformers_version") else FOUNDRY


def differences(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the two read differently, at values at which that matters."""
    flat = _flat(hf)
    return {key: flat[key] for key, same in IGNORED.items() if key in flat and flat[key] not in same}


def _flat(hf: Mapping[str, Any]) -> dict[str, Any]:
    attention = hf.get("attn_config")
    nested = {f"attn_config.{key}": value for key, value in attention.items()} if isinstance(attention, Mapping) else {}
    return {**hf, **nested}


def _remark(fields: Fields, reference: str, differing: dict[str, Any]) -> str:
    given = shown(differing, 400)
    other = FOUNDRY if reference == TRANSFORMERS else TRANSFORMERS
    how = "heeded" if reference == FOUNDRY else "not heeded (attn_pdrop drops attention, residual and MLP)"
    return f"{fields.where}: read as {reference} reads it: {given} {how}; {REFERENCE}={other} says otherwise"


def _as_transformers(fields: Fields) -> DecoderConfig:
    attention = fields.section("attn_config") or Fields({}, f"{fields.where}: attn_config", fields)
    d_model, n_heads, head_dim = _heads(fields)
    dropped = probability(attention, "attn_pdrop", 0.0)
    options = Options(
        alibi_bias_max=8.0,
        bias=False,
        clip_qkv=_clip(attention),
        softmax_scale=_softmax_scale(attention, head_dim),
        qk_norm=False,
        logit_scale=1.0,
    )
    read = [*IGNORED, "learned_pos_emb", "norm_type"]
    attention.finish([*ATTENTION_HARMLESS, *(key.removeprefix("attn_config.") for key in read)])
    config = DecoderConfig(
        model_type="mpt",
        **_shape(fields, d_model, n_heads, head_dim),
        n_kv_heads=n_heads,
        positions="alibi",
        d_ff=4 * d_model,
        activation="gelu",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, above=0.0),
        dropout=Dropout(attention=dropped, residual=dropped),
        options=options,
        hf=fields.values,
    )
    fields.finish([*HARMLESS, *read])
    return config


def _as_foundry(fields: Fields) -> DecoderConfig:
    attention = fields.section("attn_config") or Fields({}, f"{fields.where}: attn_config", fields)
    d_model, n_heads, head_dim = _heads(fields)
    alibi = attention.flag("alibi", True)
    bias_max = attention.number("alibi_bias_max", 8, above=0.0)
    learned = fields.flag("learned_pos_emb", True)
    options = Options(
        alibi_bias_max=bias_max if alibi else None,
        bias=not fields.flag("no_bias", True),
        clip_qkv=_clip(attention),
        softmax_scale=_softmax_scale(attention, head_dim),
        qk_norm=attention.flag("qk_ln", False),
        logit_scale=_logit_scale(fields, d_model),
    )
    config = DecoderConfig(
        model_type="mpt",
        **_shape(fields, d_model, n_heads, head_dim),
        n_kv_heads=_kv_heads(attention, n_heads),
        positions="alibi" if alibi else "learned" if learned else "none",
        **_mlp(fields, d_model),
        norm_eps=fields.number("norm_eps" if _given(fields, "norm_eps") else "layer_norm_epsilon", 1e-5, above=0.0),
        dropout=Dropout(
            embedding=probability(fields, "emb_pdrop", 0.0),
            attention=probability(attention, "attn_pdrop", 0.0),
            residual=probability(fields, "resid_pdrop", 0.0),
        ),
        options=options,
        hf=fields.values,
    )
    _refuse_the_rest(fields, attention, d_model)
    return config


def _given(fields: Fields, key: str) -> bool:
    return fields.take(key, None) is not None


def _heads(fields: Fields) -> tuple[int, int, int]:
    d_model = fields.integer("d_model", 2048, aliases=("hidden_size",))
    n_heads = fields.integer("n_heads", 16, aliases=("num_attention_heads",))
    return d_model, n_heads, head_size(fields.where, d_model, n_heads)


def _shape(fields: Fields, d_model: int, n_heads: int, head_dim: int) -> dict[str, Any]:
    """What both read alike."""
    return {
        "n_layers": fields.integer("n_layers", 24, most=MOST_LAYERS, aliases=("num_hidden_layers",)),
        "n_heads": n_heads,
        "head_dim": head_dim,
        "d_model": d_model,
        "vocab_size": fields.integer("vocab_size", 50368),
        "max_positions": fields.integer("max_seq_len", 2048),
        "tie": fields.flag("tie_word_embeddings", True),
        "initializer_range": fields.number("initializer_range", 0.02, within=(0.0, 1e6)),
    }


def _clip(attention: Fields) -> float | None:
    return attention.optional_number("clip_qkv", within=(0.0, float("inf"))) or None  # 0: off, in both


def _softmax_scale(attention: Fields, head_dim: int) -> float:
    scale = attention.optional_number("softmax_scale")
    return float(head_dim**-0.5) if scale is None else scale


def _logit_scale(fields: Fields, d_model: int) -> float:
    value = fields.take("logit_scale", None)
    if isinstance(value, str):
        fields.choice("logit_scale", "", ("inv_sqrt_d_model",))
        return float(d_model**-0.5)
    return 1.0 if value is None else fields.number("logit_scale")


def _kv_heads(attention: Fields, n_heads: int) -> int:
    """Of multi-head and multi-query attention; grouped queries only where they come to one of these."""
    kinds = {"multihead_attention": n_heads, "multiquery_attention": 1}
    given = attention.optional_integer("kv_n_heads")
    grouped = attention.values.get("attn_type") == "grouped_query_attention"
    if grouped and given is not None and given in kinds.values():
        attention.take("attn_type")
        return given
    kv_heads = kinds[attention.choice("attn_type", "multihead_attention", kinds)]
    if given not in (None, kv_heads):
        raise attention.refuse("kv_n_heads", f"{kv_heads} or null")
    return kv_heads


def _mlp(fields: Fields, d_model: int) -> dict[str, Any]:
    """The inner width and the activation: expansion_ratio and gelu, unless ffn_config says otherwise."""
    ratio = fields.number("expansion_ratio", 4, above=0.0, within=(0.0, MOST_RATIO))
    ffn = fields.section("ffn_config") or Fields({}, f"{fields.where}: ffn_config", fields)
    ffn.only("ffn_type", "mptmlp")
    width, activation = ffn.optional_integer("ffn_hidden_size"), _activation(ffn)
    ffn.finish(["fc_type"])
    if width is None and int(d_model * ratio) != d_model * ratio:
        raise ConfigError(f"{fields.where}: expansion_ratio = {ratio} times {d_model} is no whole number of columns")
    return {"d_ff": width or int(d_model * ratio), "activation": activation}


def _activation(ffn: Fields) -> str:
    given = ffn.take("ffn_act_fn", None)
    if given is None:
        return "gelu"
    rest = dict(given) if isinstance(given, Mapping) else {}
    name, approximate = rest.pop("name", None), rest.pop("approximate", "none")
    if name == "gelu" and approximate in ("none", "tanh") and not rest:
        return "gelu" if approximate == "none" else "gelu_new"
    if name not in ACTIVATIONS or approximate != "none" or rest:
        raise ffn.refuse("ffn_act_fn", f'{{"name": one of {", ".join(ACTIVATIONS)}}}')
    return str(name)


def _refuse_the_rest(fields: Fields, attention: Fields, d_model: int) -> None:
    """Options of llm-foundry that are understood and accepted at their neutral value only."""
    attention.only("prefix_lm", False)
    attention.only("attn_uses_sequence_id", False)
    attention.only("qk_gn", False)
    attention.only("rope", False)
    attention.only("nope", False)
    attention.only("sliding_window_size", -1, None)
    attention.only("attn_logit_softcapping", None)
    attention.only("fused_qkv", True)
    attention.only("kv_dim", None, d_model)
    attention.only("reuse_kv_layer_idx", None)
    tuning = attention.take("attn_temperature_tuning", None) or {}
    if not isinstance(tuning, Mapping) or tuning.get("attn_scale", 0.0) not in (0, None):
        raise attention.refuse("attn_temperature_tuning", "attn_scale 0")
    attention.finish(ATTENTION_HARMLESS)
    overrides = fields.take("block_overrides", None) or {}
    if not isinstance(overrides, Mapping) or overrides.get("overrides"):
        raise fields.refuse("block_overrides", "null")
    fields.only("norm_type", "low_precision_layernorm", "layernorm")
    fields.only("embedding_fraction", 1)
    fields.only("final_logit_softcapping", None)
    fields.finish(HARMLESS)
