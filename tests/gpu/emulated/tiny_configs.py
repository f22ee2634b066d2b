"""A small configuration of every family, as a Hugging Face config.json."""

from __future__ import annotations

from typing import Any

VOCAB = 640
_NEOX = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 1024}
_MPT = {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 8, "max_seq_len": 1024}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", **_GPT2},
    "gpt_neox": {"model_type": "gpt_neox", "intermediate_size": 256, **_NEOX},
    "gpt_neox_japanese": {"model_type": "gpt_neox_japanese", **_NEOX},
    "mpt": {"model_type": "mpt", **_MPT},
    "gpt_bigcode": {"model_type": "gpt_bigcode", **_GPT2},
    "llama": {"model_type": "llama", "intermediate_size": 128, "num_key_value_heads": 4, **_NEOX},
}
