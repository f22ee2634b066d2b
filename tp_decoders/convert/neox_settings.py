"""From the settings a GPT-NeoX model was trained with (its .yml) to what config.json says.

Only settings that change what the model computes are read, with the defaults of GPT-NeoX's own code; those that
transformers' GPT-NeoX cannot express are refused. Optimiser, data and paths are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel.errors import ConfigError

MODEL_TYPE = "gpt_neox"
NAMED = {"architectures": ["GPTNeoXForCausalLM"]}
"""What a configuration of the family says of itself."""
REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
ONLY: dict[str, tuple[Any, ...]] = {
    "pos_emb": ("rotary",),
    "norm": ("layernorm",),
    "activation": ("gelu", "relu"),
    "gpt_j_tied": (False,),
    "mlp_type": ("regular",),
    "use_bias_in_norms": (True,),
}
DEFAULTS = {
    "pos_emb": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "gpt_j_tied": False,
    "mlp_type": "regular",
    "use_bias_in_norms": True,
}


def is_neox_settings(settings: Mapping[str, Any]) -> bool:
    """Whether a mapping looks like a GPT-NeoX .yml, and not like a model preset."""
    return "model_type" not in settings and "num_layers" in _normal(settings)


def hf_of_settings(settings: Mapping[str, Any], vocab_size: int, where: str) -> dict[str, Any]:
    """The contents of config.json. The vocabulary's size (with padding) is the checkpoint's, not in the settings."""
    given = {**DEFAULTS, **_normal(settings)}
    _check(given, where)
    fused_gelu = given["activation"] == "gelu" and given.get(
        "bias_gelu_fusion", False
    )  # the fused one is the tanh form
    return {
        **NAMED,
        "model_type": MODEL_TYPE,
        "vocab_size": vocab_size,
        "hidden_size": given["hidden_size"],
        "num_hidden_layers": given["num_layers"],
        "num_attention_heads": given["num_attention_heads"],
        "intermediate_size": given.get("intermediate_size") or 4 * given["hidden_size"],
        "max_position_embeddings": given["max_position_embeddings"],
        "hidden_act": "gelu_fast" if fused_gelu else given["activation"],
        "rotary_pct": given.get("rotary_pct", 1.0),
        "rotary_emb_base": given.get("rotary_emb_base", 10000),
        "use_parallel_residual": given.get("gpt_j_residual", False),
        "attention_bias": given.get("use_bias_in_attn_linear", True),
        "layer_norm_eps": given.get("layernorm_epsilon", 1e-5),
        "initializer_range": given.get("init_method_std", 0.02),
        "hidden_dropout": given.get("hidden_dropout", 0.0),
        "attention_dropout": given.get("attention_dropout", 0.0),
        "tie_word_embeddings": not given.get("no_weight_tying", False),
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _normal(settings: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-NeoX takes names with - as with _."""
    return {str(name).replace("-", "_"): value for name, value in settings.items()}


def _check(given: Mapping[str, Any], where: str) -> None:
    missing = [name for name in REQUIRED if not isinstance(given.get(name), int)]
    if missing:
        raise ConfigError(f"{where} gives no number for {', '.join(missing)}; add them, or give a config.json")
    for name, accepted in ONLY.items():
        if name in given and given[name] not in accepted:
            raise ConfigError(
                f"{where}: {name} = {given[name]!r} has no counterpart in transformers' GPT-NeoX; supported: "
                f"{' or '.join(map(repr, accepted))}"
            )
    kinds = set(_words(given.get("attention_config"))) - {"global"}
    if kinds:
        raise ConfigError(f"{where}: attention_config has {sorted(kinds)}; supported is 'global' in every layer")
    kv_heads = given.get("num_kv_heads")
    if kv_heads not in (None, given["num_attention_heads"]):
        raise ConfigError(f"{where}: num_kv_heads = {kv_heads}; GPT-NeoX in transformers has one for each query head")


def _words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    return [value] if isinstance(value, str) else []
