"""The settings of well-known checkpoints (tests/data/checkpoints.json), and the same made small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[2] / "data" / "checkpoints.json"
PUBLISHED: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))["checkpoints"]
HEAD_DIM = 8
GPT = ("n_embd", "n_head", "n_inner", "n_layer", "n_positions")
NEOX = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
MPT = ("d_model", "n_heads", "", "n_layers", "max_seq_len")
SIZES = {"gpt2": GPT, "gpt_bigcode": GPT, "gpt_neox": NEOX, "gpt_neox_japanese": NEOX, "mpt": MPT}
"""What each family calls its width, heads, inner width, layers and context."""


def small(config: dict[str, Any]) -> dict[str, Any]:
    """Two layers, heads of HEAD_DIM and a small vocabulary; the number of heads, ratios and all else as they are."""
    width, heads, inner, layers, context = SIZES[config["model_type"]]
    d_model = config[heads] * HEAD_DIM
    changed = {width: d_model, layers: 2, context: 64, "vocab_size": 97}
    if config.get(inner):
        changed[inner] = config[inner] * d_model // config[width]
    if "n_ctx" in config:
        changed["n_ctx"] = 64
    return {**config, **changed}


def readable(config: dict[str, Any]) -> dict[str, Any]:
    """The same for transformers 5, which refuses an integer for MPT's clip_qkv."""
    attention = config.get("attn_config") or {}
    if attention.get("clip_qkv") is None:
        return config
    return {**config, "attn_config": {**attention, "clip_qkv": float(attention["clip_qkv"])}}
