"""Configurations drawn at random: a family, its sizes, heads and options, a tensor-parallel size, sequences.

A case is a function of its seed alone. Options that transformers does not heed (MPT's) are drawn for the dense model
of the tests instead, where llm-foundry's meaning is written down.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from tests.tp_decoders.families.dense_mpt import DenseMpt, random_weight

ACTIVATIONS = (
    "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_10", "quick_gelu", "relu", "relu2", "relu6", "silu",
    "mish", "tanh", "sigmoid", "leaky_relu", "linear", "laplace",
)  # fmt: skip
CLASSES = {
    "gpt2": "GPT2", "gpt_bigcode": "GPTBigCode", "gpt_neox": "GPTNeoX", "gpt_neox_japanese": "GPTNeoXJapanese",
    "llama": "Llama", "qwen3": "Qwen3",
}  # fmt: skip
NEWER = ("llama", "qwen3")


@dataclass(frozen=True)
class Case:
    """What one seed stands for."""

    seed: int
    family: str
    config: dict[str, Any]
    tp: int
    lengths: tuple[int, ...]
    dense: bool  # the tests' own MPT is the reference, not transformers

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.family} at tp = {self.tp}, sequences {self.lengths}, {self.config}"


def draw(seed: int) -> Case:
    rng, newer = random.Random(seed), random.Random(f"newer {seed}")  # what it draws leaves other cases as they were
    family = rng.choice(["gpt2", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "mpt"])
    family = newer.choice(NEWER) if newer.random() < 0.3 else family
    heads, head_dim = rng.choice([1, 2, 3, 4, 5, 7, 8, 12]), rng.choice([2, 4, 6, 8, 10, 16, 24])
    reach = rng.choice([16, 33, 64])
    shape = {"heads": heads, "width": heads * head_dim, "layers": rng.randint(1, 3), "vocab": rng.randint(2, 300)}
    config, dense = _OPTIONS[family](rng, shape, reach), False
    if family == "mpt":
        dense = bool(set(config) - {"d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len"})
    lengths = tuple(rng.randint(1, min(reach, 24)) for _ in range(rng.randint(1, 4)))
    return Case(seed, family, config, rng.randint(1, 4), (*lengths, 5), dense)


def _gpt2(rng: random.Random, shape: dict[str, int], reach: int) -> dict[str, Any]:
    config = {
        "n_embd": shape["width"], "n_head": shape["heads"], "n_layer": shape["layers"], "vocab_size": shape["vocab"],
        "n_positions": reach, "activation_function": rng.choice(ACTIVATIONS),
    }  # fmt: skip
    if rng.random() < 0.4:
        config["n_inner"] = rng.randint(1, 3 * shape["width"])
    for flag in ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        if rng.random() < 0.4:
            config[flag] = rng.random() < 0.5
    config["tie_word_embeddings"] = rng.random() < 0.5
    config["layer_norm_epsilon"] = rng.choice([1e-5, 1e-3])
    return config


def _bigcode(rng: random.Random, shape: dict[str, int], reach: int) -> dict[str, Any]:
    config = _gpt2(rng, shape, reach)
    for flag in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        config.pop(flag, None)
    for flag in ("multi_query", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):
        config[flag] = rng.random() < 0.6
    return config


def _neox(rng: random.Random, shape: dict[str, int], reach: int) -> dict[str, Any]:
    config = _rotary(rng, shape, reach)
    config |= {
        "intermediate_size": rng.randint(1, 4 * shape["width"]), "hidden_act": rng.choice(ACTIVATIONS),
        "use_parallel_residual": rng.random() < 0.5, "attention_bias": rng.random() < 0.7,
        "tie_word_embeddings": rng.random() < 0.3, "layer_norm_eps": rng.choice([1e-5, 1e-3]),
    }  # fmt: skip
    return config


def _rotary(rng: random.Random, shape: dict[str, int], reach: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "hidden_size": shape["width"], "num_attention_heads": shape["heads"], "num_hidden_layers": shape["layers"],
        "vocab_size": shape["vocab"], "max_position_embeddings": reach, "rotary_pct": rng.choice([0.25, 0.5, 1.0]),
        "rotary_emb_base": rng.choice([100, 10000]),
    }  # fmt: skip
    if rng.random() < 0.3:
        config["rope_scaling"] = {"rope_type": rng.choice(["linear", "dynamic"]), "factor": rng.choice([1.5, 4.0])}
    return config


def _japanese(rng: random.Random, shape: dict[str, int], reach: int) -> dict[str, Any]:
    return _rotary(rng, shape, reach) | {
        "intermediate_multiple_size": rng.randint(1, 5), "hidden_act": rng.choice(ACTIVATIONS),
        "layer_norm_eps": rng.choice([1e-5, 1e-3]),
    }  # fmt: skip


def _mpt(rng: random.Random, shape: dict[str, int], reach: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "d_model": shape["width"], "n_heads": shape["heads"], "n_layers": shape["layers"],
        "vocab_size": shape["vocab"], "max_seq_len": reach,
    }  # fmt: skip
    if rng.random() < 0.4:
        return config
    attention: dict[str, Any] = {"alibi": rng.random() < 0.6, "qk_ln": rng.random() < 0.4}
    if rng.random() < 0.4:
        attention["clip_qkv"] = rng.choice([0.5, 2.0])
    if rng.random() < 0.4:
        attention["softmax_scale"] = rng.choice([0.1, 1.0])
    if rng.random() < 0.4:
        attention["alibi_bias_max"] = rng.choice([4, 16])
    if rng.random() < 0.3:
        attention["attn_type"] = "multiquery_attention"
    config |= {"attn_config": attention, "no_bias": rng.random() < 0.5, "learned_pos_emb": True}
    config["expansion_ratio"] = rng.choice([1, 2, 4])
    if rng.random() < 0.5:
        config["logit_scale"] = rng.choice([0.3, "inv_sqrt_d_model"])
    return config


def _llama(rng: random.Random, shape: dict[str, int], reach: int) -> dict[str, Any]:
    heads = shape["heads"]
    config: dict[str, Any] = {
        "hidden_size": shape["width"], "num_attention_heads": heads, "num_hidden_layers": shape["layers"],
        "vocab_size": shape["vocab"], "max_position_embeddings": reach, "intermediate_size": rng.randint(1, 99),
        "num_key_value_heads": rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "head_dim": rng.choice([shape["width"] // heads, 4, 10]), "hidden_act": rng.choice(ACTIVATIONS),
        "attention_bias": rng.random() < 0.4, "tie_word_embeddings": rng.random() < 0.4,
        "rms_norm_eps": rng.choice([1e-6, 1e-3]),
    }  # fmt: skip
    kind = rng.choice(["default"] * 4 + ["linear", "llama3", "yarn"])
    if kind != "default":
        config["rope_scaling"] = {"rope_type": kind, "factor": rng.choice([1.5, 4.0])}
    if kind == "llama3":
        config["rope_scaling"] |= {
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": reach // 2,
        }  # fmt: skip
    return config


_OPTIONS = {
    "gpt2": _gpt2, "gpt_bigcode": _bigcode, "gpt_neox": _neox, "gpt_neox_japanese": _japanese, "mpt": _mpt,
    "llama": _llama, "qwen3": _llama,
}  # fmt: skip


def hf_config(case: Case) -> dict[str, Any]:
    """The contents of the case's config.json."""
    if case.dense:
        return {"model_type": "mpt", **case.config}
    return _transformers_config(case).to_dict()  # type: ignore[no-any-return]


def write_drawn(case: Case, folder: Path) -> dict[str, float]:
    """The case's checkpoint with random weights, and what the reference makes of random sequences in float64.

    Returns how far its own float32 is from that, by what it was found in: some drawn models (layer norms over two
    elements) are so badly conditioned that float32 means little.
    """
    torch.manual_seed(case.seed)
    folder.mkdir()
    model: Any = DenseMpt(**case.config) if case.dense else _transformers_model(case)
    (model.save if case.dense else model.save_pretrained)(folder)
    tokens = torch.randint(case.config["vocab_size"], (sum(case.lengths),))
    narrow = _answers(model, case, tokens)
    wide = _answers(in_float64(model, case), case, tokens) if case.family != "mpt" or case.dense else narrow
    torch.save(wide, folder / "reference.pt")
    pairs = {name: (narrow[name], wide[name]) for name in ("logits", "loss")}
    pairs |= {name: (narrow["grads"][name], grad) for name, grad in wide["grads"].items()}
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


def in_float64(model: Any, case: Case) -> Any:
    """The same function in float64. (transformers' MPT cannot: it fills float32 masks with float64's lowest number.)"""
    if case.dense:
        model.weights = {name: weight.detach().double().requires_grad_() for name, weight in model.weights.items()}
        return model
    model.zero_grad()
    for module in model.modules():  # it asks for float32, and changes nothing else
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False
    return model.double()


def _answers(model: Any, case: Case, tokens: Tensor) -> dict[str, Any]:
    parts = tokens.split(case.lengths)
    targets = torch.cat([torch.cat([part[1:], torch.tensor([-100])]) for part in parts])
    logits = torch.cat([model.logits(part) if case.dense else model(part[None]).logits[0] for part in parts])
    loss = functional.cross_entropy(logits, targets)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "tokens": tokens, "targets": targets, "logits": logits.detach(), "loss": loss.detach(), "grads": grads,
        "lengths": case.lengths,
    }  # fmt: skip


def _transformers_config(case: Case) -> Any:
    return getattr(transformers, f"{CLASSES.get(case.family, 'Mpt')}Config")(**case.config)


def _transformers_model(case: Case) -> Any:
    config = _transformers_config(case)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for key, parameter in model.named_parameters():
        parameter.data = random_weight(key, tuple(parameter.shape))
    return model
