"""What config.json says when a model is saved: what it said when it was read, in a form every transformers reads.

transformers 5 takes a number only in the type it declares (an MPT with clip_qkv 6 or attn_pdrop 0.0 is refused), while
4 takes both; so whole numbers are written in the declared type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

FLOATS = frozenset(
    """
    layer_norm_eps layer_norm_epsilon rms_norm_eps
    initializer_range embedding_fraction logit_scale clip_qkv softmax_scale
    """.split()  # noqa: SIM905
)
INTEGERS = frozenset(
    """
    alibi_bias_max attn_pdrop expansion_ratio intermediate_multiple_size intermediate_size n_inner n_embd n_head n_layer
    n_positions d_model n_heads n_layers max_seq_len hidden_size num_hidden_layers num_attention_heads
    max_position_embeddings vocab_size num_key_value_heads head_dim
    """.split()  # noqa: SIM905
)


def config_to_write(hf: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The contents of config.json for weights of this type."""
    named = [key for key in ("dtype", "torch_dtype") if key in hf] or ["dtype"]
    written = {key: _declared(key, value) for key, value in hf.items()}
    return written | dict.fromkeys(named, str(dtype).removeprefix("torch."))


def _declared(key: str, value: Any) -> Any:
    if key == "attn_config" and isinstance(value, Mapping):
        return {inner: _declared(inner, found) for inner, found in value.items()}
    if key in FLOATS and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if key in INTEGERS and isinstance(value, float) and value.is_integer():
        return int(value)
    return value
