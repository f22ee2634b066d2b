"""The parity tests' oracle: reference models by case, their checkpoints, logits, loss, gradients; the same on ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from parallel.attention.forward_pass import Pass
from parallel.ranks.group import Group
from parallel.sharding.rules import rule_of
from parallel.vocabulary.cross_entropy import vocab_cross_entropy
from tests.tp_decoders.families.dense_mpt import DenseMpt, random_weight
from tp_decoders import load
from tp_decoders.registry import family_of

LENGTHS = (7, 1, 5)
TOLERANCE = 1e-4
NO_GRADIENT = "attention.norm.k.bias"  # the same for all keys, which a softmax does not see

GPT2 = {"vocab_size": 31, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4}
NEOX = {
    "vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72,
    "max_position_embeddings": 32,
}  # fmt: skip
JAPANESE = {
    "vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
LLAMA = {
    "vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 44, "max_position_embeddings": 32,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MPT = {"vocab_size": 29, "d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}


def hf(name: str, base: dict[str, Any], **options: Any) -> Callable[[], transformers.PreTrainedModel]:
    """A tiny transformers model with random weights, in eval mode."""

    def make() -> transformers.PreTrainedModel:
        config = getattr(transformers, f"{name}Config")(**{**base, **options})
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for key, parameter in model.named_parameters():
            parameter.data = random_weight(key, tuple(parameter.shape))
        return model

    return make


def mpt(**options: Any) -> Callable[[], DenseMpt]:
    """llm-foundry's MPT, for options that transformers leaves out."""
    return lambda: DenseMpt(**options)


CASES: dict[str, Callable[[], Any]] = {
    "gpt2": hf("GPT2", GPT2),
    "gpt2 25 heads": hf("GPT2", GPT2, n_head=25, n_embd=100),
    "gpt2 3 heads": hf("GPT2", GPT2, n_head=3),
    "gpt2 1 head": hf("GPT2", GPT2, n_head=1),
    "gpt2 vocabulary 50257": hf("GPT2", GPT2, vocab_size=50257, n_embd=8),
    "gpt2 vocabulary 3": hf("GPT2", GPT2, vocab_size=3),
    "gpt2 untied": hf("GPT2", GPT2, tie_word_embeddings=False),
    "gpt2 inverse layer scale": hf("GPT2", GPT2, scale_attn_by_inverse_layer_idx=True),
    "gpt2 unscaled": hf("GPT2", GPT2, scale_attn_weights=False),
    "gpt2 upcast": hf("GPT2", GPT2, reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True),
    "gpt2 odd mlp": hf("GPT2", GPT2, n_inner=37),
    "gpt2 tiny mlp": hf("GPT2", GPT2, n_inner=2),
    "gpt2 relu": hf("GPT2", GPT2, activation_function="relu"),
    "gpt2 tanh": hf("GPT2", GPT2, activation_function="tanh"),
    "neox": hf("GPTNeoX", NEOX),
    "neox sequential": hf("GPTNeoX", NEOX, use_parallel_residual=False),
    "neox 25 heads": hf("GPTNeoX", NEOX, num_attention_heads=25, hidden_size=200),
    "neox 3 heads": hf("GPTNeoX", NEOX, num_attention_heads=3, hidden_size=24, rotary_pct=0.5),
    "neox vocabulary 50257": hf("GPTNeoX", NEOX, vocab_size=50257, hidden_size=16, rotary_pct=1.0),
    "neox no attention bias": hf("GPTNeoX", NEOX, attention_bias=False),
    "neox tied": hf("GPTNeoX", NEOX, tie_word_embeddings=True),
    "neox full rotary": hf("GPTNeoX", NEOX, rotary_pct=1.0, rotary_emb_base=500),
    "neox no rotary": hf("GPTNeoX", NEOX, rotary_pct=0.0),
    "neox linear scaling": hf("GPTNeoX", NEOX, rope_scaling={"type": "linear", "factor": 2.5}, rotary_pct=1.0),
    "neox dynamic scaling": hf("GPTNeoX", NEOX, rope_scaling={"rope_type": "dynamic", "factor": 2.0}, rotary_pct=0.5),
    "neox gelu_fast": hf("GPTNeoX", NEOX, hidden_act="gelu_fast"),
    "neox relu sequential": hf("GPTNeoX", NEOX, hidden_act="relu", use_parallel_residual=False, attention_bias=False),
    "japanese": hf("GPTNeoXJapanese", JAPANESE),
    "japanese 3 heads": hf("GPTNeoXJapanese", JAPANESE, num_attention_heads=3),
    "japanese 25 heads": hf("GPTNeoXJapanese", JAPANESE, num_attention_heads=25, hidden_size=50),
    "japanese narrow": hf("GPTNeoXJapanese", JAPANESE, intermediate_multiple_size=1, rotary_pct=0.34),
    "japanese untied": hf("GPTNeoXJapanese", JAPANESE, tie_word_embeddings=False, hidden_act="silu"),
    "japanese linear scaling": hf("GPTNeoXJapanese", JAPANESE, rope_scaling={"type": "linear", "factor": 2.0}),
    "mpt": hf("Mpt", MPT),
    "mpt 3 heads": hf("Mpt", MPT, n_heads=3),
    "mpt 25 heads": hf("Mpt", MPT, n_heads=25, d_model=50),
    "mpt vocabulary 50257": hf("Mpt", MPT, vocab_size=50257, d_model=8),
    "mpt untied": hf("Mpt", MPT, tie_word_embeddings=False),
    "mpt clip and scale": hf("Mpt", MPT, attn_config={"clip_qkv": 0.7, "softmax_scale": 0.9}),
    "mpt foundry": mpt(),
    "mpt alibi maximum": mpt(attn_config={"alibi_bias_max": 3}),
    "mpt learned positions": mpt(attn_config={"alibi": False}, learned_pos_emb=True),
    "mpt biases": mpt(no_bias=False, logit_scale=0.3),
    "mpt query-key norm": mpt(attn_config={"qk_ln": True, "clip_qkv": 1.0}, logit_scale="inv_sqrt_d_model"),
    "mpt expansion": mpt(expansion_ratio=1.5),
    "mpt multi-query": mpt(attn_config={"attn_type": "multiquery_attention"}),
    "mpt multi-query norm": mpt(attn_config={"attn_type": "multiquery_attention", "qk_ln": True}, no_bias=False),
    "bigcode": hf("GPTBigCode", GPT2),
    "bigcode 3 heads": hf("GPTBigCode", GPT2, n_head=3),
    "bigcode 25 heads": hf("GPTBigCode", GPT2, n_head=25, n_embd=50),
    "bigcode 1 head": hf("GPTBigCode", GPT2, n_head=1),
    "bigcode vocabulary 50257": hf("GPTBigCode", GPT2, vocab_size=50257, n_embd=8),
    "bigcode multi-head": hf("GPTBigCode", GPT2, multi_query=False),
    "bigcode multi-head 3 heads": hf("GPTBigCode", GPT2, multi_query=False, n_head=3),
    "bigcode untied": hf("GPTBigCode", GPT2, tie_word_embeddings=False, activation_function="relu"),
    "bigcode unscaled": hf("GPTBigCode", GPT2, scale_attn_weights=False, n_inner=37),
    "bigcode softmax flags": hf(
        "GPTBigCode", GPT2, attention_softmax_in_fp32=False, scale_attention_softmax_in_fp32=False
    ),
    "llama": hf("Llama", LLAMA),
    "llama multi-head": hf("Llama", LLAMA, num_key_value_heads=8),
    "llama multi-query": hf("Llama", LLAMA, num_key_value_heads=1),
    "llama 8 of 16 heads": hf("Llama", LLAMA, num_attention_heads=16, num_key_value_heads=8, head_dim=6),
    "llama 3 of 6 heads": hf("Llama", LLAMA, num_attention_heads=6, num_key_value_heads=3, head_dim=8),
    "llama 5 of 25 heads": hf("Llama", LLAMA, num_attention_heads=25, num_key_value_heads=5, head_dim=4),
    "llama 2 of 14 heads": hf("Llama", LLAMA, num_attention_heads=14, num_key_value_heads=2, head_dim=10),
    "llama biases": hf("Llama", LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama gelu": hf("Llama", LLAMA, hidden_act="gelu_10", intermediate_size=37, rms_norm_eps=1e-3),
    "llama vocabulary 50257": hf("Llama", LLAMA, vocab_size=50257, hidden_size=16),
    "llama linear": hf("Llama", LLAMA, rope_scaling={"rope_type": "linear", "factor": 2.5}),
    "llama dynamic": hf("Llama", LLAMA, rope_scaling={"rope_type": "dynamic", "factor": 2.0}, head_dim=8),
    "llama llama3": hf("Llama", LLAMA, rope_scaling=LLAMA3, rope_theta=500.0, head_dim=16),
    "llama yarn": hf("Llama", LLAMA, rope_scaling={"rope_type": "yarn", "factor": 4.0}, rope_theta=100.0, head_dim=16),
    "mistral": hf("Mistral", LLAMA, sliding_window=32, num_key_value_heads=4),
    "qwen2": hf("Qwen2", LLAMA, tie_word_embeddings=True),
    "qwen3": hf("Qwen3", LLAMA, head_dim=6),
    "qwen3 3 of 12 heads": hf(
        "Qwen3", LLAMA, num_attention_heads=12, num_key_value_heads=3, head_dim=6, attention_bias=True
    ),
}  # fmt: skip


def write_reference(case: str, folder: Path) -> None:
    """The case's checkpoint, and beside it what the reference computes for a batch of sequences of LENGTHS."""
    torch.manual_seed(hash_of(case))
    model = CASES[case]()
    save = model.save if isinstance(model, DenseMpt) else model.save_pretrained
    save(folder)
    vocab_size = model.hf["vocab_size"] if isinstance(model, DenseMpt) else model.config.vocab_size
    tokens = torch.randint(vocab_size, (sum(LENGTHS),))
    targets = torch.cat([torch.cat([part[1:], torch.tensor([-100])]) for part in tokens.split(LENGTHS)])
    sequences = tokens.split(LENGTHS)
    if isinstance(model, DenseMpt):
        logits = torch.cat([model.logits(part) for part in sequences])
    else:
        logits = torch.cat([model(part[None]).logits[0] for part in sequences])
    loss = functional.cross_entropy(logits, targets)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    content = {"tokens": tokens, "targets": targets, "logits": logits.detach(), "loss": loss.detach(), "grads": grads}
    torch.save(content, folder / "reference.pt")


def hash_of(case: str) -> int:
    return sum(i * byte for i, byte in enumerate(case.encode(), 1))


@dataclass(frozen=True)
class Deviation:
    """How far one rank is from the reference: the largest error over the largest value, by what it was found in."""

    errors: dict[str, float]
    collectives: Counter[str]

    def beyond(self, tolerance: float) -> dict[str, float]:
        return {name: error for name, error in self.errors.items() if not error <= tolerance}


def fast_deviation(group: Group, folder: str) -> Deviation:
    """As `deviation`, with plain sums in place of the fixed tree."""
    return deviation(replace(group, numerics="fast"), folder)


def deviation(group: Group, folder: str, backend: str | None = None) -> Deviation:
    """Runs the case forward and backward on this rank and compares logits, loss and its shard of every gradient."""
    reference = torch.load(Path(folder) / "reference.pt")
    model, lengths = load(folder, group=group), reference.get("lengths", LENGTHS)
    before = Counter(group.comm.counts) if group.comm else Counter()
    logits = model(reference["tokens"], Pass.packed(lengths, backend=backend))
    collectives = Counter(group.comm.counts) - before if group.comm else Counter()
    loss = vocab_cross_entropy(logits, reference["targets"], model.head.shards, group)
    loss.backward()
    errors = {
        "logits": error(model.head.gather(logits.detach()), reference["logits"], reference["logits"]),
        "loss": error(loss.detach(), reference["loss"], reference["loss"]),
    }
    names = family_of(model.config.model_type).names
    for ours, parameter in model.named_parameters():
        name, theirs = names.theirs(ours)
        full = reference["grads"][theirs].t() if name.transposed else reference["grads"][theirs]
        assert parameter.grad is not None, f"{ours} has no gradient"
        scale = torch.ones(()) if ours.endswith(NO_GRADIENT) else full
        errors[ours] = error(parameter.grad, rule_of(parameter).take(full, group.rank), scale)
    return Deviation(errors, collectives)


def error(ours: Tensor, theirs: Tensor, whole: Tensor) -> float:
    """The largest difference, relative to the largest value of the whole tensor."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    return ((ours - theirs).abs().max() / whole.abs().max()).item() if ours.numel() else 0.0
