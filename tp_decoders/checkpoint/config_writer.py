"""What config.json says when a model is saved: what it said when it was read, in a form every transformers reads.

transformers 5 takes a number only in the type it declares (an MPT with clip_qkv 6 or attn_pdrop 0.0 is refused), while
4 takes both; so whole numbers are written in the declared type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tp_decoders.model.config import DecoderConfig
from tp_decoders.registry import family_of

FLOATS = frozenset({"layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "initializer_range"})
INTEGERS = frozenset(
    """
    hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings vocab_size
    """.split()  # noqa: SIM905
)
"""By the names that several families have; their own names are in `Family`."""


def config_to_write(config: DecoderConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of config.json for weights of this type."""
    named = [key for key in ("dtype", "torch_dtype") if key in config.hf] or ["dtype"]
    family = family_of(config.model_type)
    written = _declared(config.hf, FLOATS.union(family.floats), INTEGERS.union(family.integers))
    return written | dict.fromkeys(named, str(dtype).removeprefix("torch."))


def _declared(values: Mapping[str, Any], floats: frozenset[str], integers: frozenset[str]) -> dict[str, Any]:
    def declared(key: str, value: Any) -> Any:
        if key == "attn_config" and isinstance(value, Mapping):
            return _declared(value, floats, integers)
        if key in floats and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        return int(value) if key in integers and isinstance(value, float) and value.is_integer() else value

    return {key: declared(key, value) for key, value in values.items()}
