"""Tiny random checkpoints of the families, their answers depend on all of the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

CONTEXT = 128
VOCAB = 97

_GPT2: dict[str, Any] = {"n_positions": CONTEXT, "n_embd": 48, "n_layer": 2, "n_head": 6}
_NEOX: dict[str, Any] = {
    "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 5, "max_position_embeddings": CONTEXT,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {**_GPT2, "tie_word_embeddings": False}),  # tied, it repeats its last token
    "gpt_neox": ("GPTNeoX", {**_NEOX, "intermediate_size": 104, "rotary_pct": 0.5}),
    "gpt_neox_japanese": ("GPTNeoXJapanese", _NEOX),
    "mpt": ("Mpt", {"d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": CONTEXT, "tie_word_embeddings": False}),
    "gpt_bigcode": ("GPTBigCode", _GPT2),
    "llama": ("Llama", {**_NEOX, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
                        "intermediate_size": 104}),
}  # fmt: skip
_GPT2_DROPOUTS = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}
_NEOX_DROPOUTS = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
DROPOUTS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2_DROPOUTS,
    "gpt_neox": _NEOX_DROPOUTS,
    "gpt_neox_japanese": _NEOX_DROPOUTS,
    "mpt": {"attn_config": {"attn_pdrop": 0.1}, "resid_pdrop": 0.1, "emb_pdrop": 0.1},
    "gpt_bigcode": _GPT2_DROPOUTS,
    "llama": {"attention_dropout": 0.1},
}
"""The same families with dropout wherever they have it."""
WIDE: dict[str, Any] = {
    "hidden_size": 1040, "num_attention_heads": 13, "intermediate_size": 4160, "num_hidden_layers": 1,
    "vocab_size": 5003,
}  # fmt: skip
"""A GPT-NeoX whose sums are long and uneven at every size."""


def tiny_model(family: str, **more: Any) -> transformers.PreTrainedModel:
    """A transformers model of the family; the same weights on every call."""
    name, options = CONFIGS[family]
    fields = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, **options, **more}
    config = getattr(transformers, f"{name}Config")(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.manual_seed(sum(map(ord, family)))
    for key, parameter in model.named_parameters():
        parameter.data = _random(
            key, tuple(parameter.shape), is_norm=bool(parameter.dim() == 1 and parameter.mean() > 0.5)
        )
    return model


def _random(name: str, shape: tuple[int, ...], is_norm: bool) -> torch.Tensor:
    if len(shape) == 1:
        return torch.randn(shape) * 0.1 + is_norm
    embeds = any(part in name for part in ("wte", "wpe", "embed_in", "embed_tokens"))
    return torch.randn(shape) * (0.3 if embeds else 3.0 * shape[-1] ** -0.5)


def save_tiny(family: str, folder: Path, **more: Any) -> Path:
    tiny_model(family, **more).save_pretrained(folder)
    return folder
