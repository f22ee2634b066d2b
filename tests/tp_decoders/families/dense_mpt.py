"""MPT as llm-foundry defines it, dense, in plain torch: the reference for options that transformers does not heed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

SIZES = {"d_model": 24, "n_heads": 6, "n_layers": 2, "vocab_size": 29, "max_seq_len": 32}


class DenseMpt:
    """Random weights under llm-foundry's names, and the forward of one sequence."""

    def __init__(self, **options: Any) -> None:
        self.hf = {"model_type": "mpt", **SIZES, **options}
        self.attn = {"alibi": True, **options.get("attn_config", {})}
        self.weights = {name: random_weight(name, shape).requires_grad_() for name, shape in self.shapes().items()}

    @property
    def learned_positions(self) -> bool:
        return bool(self.hf.get("learned_pos_emb", True)) and not self.attn["alibi"]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        d, v = self.hf["d_model"], self.hf["vocab_size"]
        f = int(self.hf.get("expansion_ratio", 4) * d)
        kv = d // self.hf["n_heads"] if self.attn.get("attn_type") == "multiquery_attention" else d
        modules: dict[str, tuple[int, ...]] = {
            "norm_1": (d,),
            "attn.Wqkv": (d + 2 * kv, d),
            "attn.out_proj": (d, d),
            "norm_2": (d,),
        }
        modules |= {"ffn.up_proj": (f, d), "ffn.down_proj": (d, f)}
        modules |= {"attn.q_ln": (d,), "attn.k_ln": (kv,)} if self.attn.get("qk_ln") else {}
        shapes: dict[str, tuple[int, ...]] = {"wte.weight": (v, d)}
        shapes |= {} if not self.learned_positions else {"wpe.weight": (self.hf["max_seq_len"], d)}
        for name, shape in self._all(modules).items():
            shapes[f"{name}.weight"] = shape
            if not self.hf.get("no_bias", True):
                shapes[f"{name}.bias"] = shape[:1]
        return {f"transformer.{name}": shape for name, shape in shapes.items()}

    def _all(self, modules: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        blocks = {f"blocks.{i}.{name}": shape for i in range(self.hf["n_layers"]) for name, shape in modules.items()}
        return blocks | {"norm_f": (self.hf["d_model"],)}

    def save(self, folder: Path) -> None:
        save_file({name: weight.detach() for name, weight in self.weights.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.hf))

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        return list(self.weights.items())

    def logits(self, ids: Tensor) -> Tensor:
        x = self.weights["transformer.wte.weight"][ids]
        if self.learned_positions:
            x = x + self.weights["transformer.wpe.weight"][: len(ids)]
        for i in range(self.hf["n_layers"]):
            x = x + self.attention(f"blocks.{i}.", self.norm(f"blocks.{i}.norm_1", x))
            up = functional.gelu(self.linear(f"blocks.{i}.ffn.up_proj", self.norm(f"blocks.{i}.norm_2", x)))
            x = x + self.linear(f"blocks.{i}.ffn.down_proj", up)
        scale = self.hf.get("logit_scale") or 1.0
        scale = 1 / math.sqrt(self.hf["d_model"]) if scale == "inv_sqrt_d_model" else scale
        return self.norm("norm_f", x) @ self.weights["transformer.wte.weight"].t() * scale

    def attention(self, block: str, x: Tensor) -> Tensor:
        t, d = x.shape
        n = self.hf["n_heads"]
        h = d // n
        kv = h if self.attn.get("attn_type") == "multiquery_attention" else d
        clip = self.attn.get("clip_qkv") or math.inf
        q, k, v = self.linear(f"{block}attn.Wqkv", x).clamp(-clip, clip).split((d, kv, kv), 1)
        if self.attn.get("qk_ln"):
            q, k = self.norm(f"{block}attn.q_ln", q), self.norm(f"{block}attn.k_ln", k)
        q, k, v = q.view(t, n, h), k.view(t, -1, h).expand(t, n, h), v.view(t, -1, h).expand(t, n, h)
        scores = torch.einsum("qnh,knh->nqk", q, k) * (self.attn.get("softmax_scale") or h**-0.5)
        if self.attn["alibi"]:
            steps = torch.arange(t)
            slopes = torch.tensor(slopes_of(n, self.attn.get("alibi_bias_max", 8)))
            scores = scores + slopes[:, None, None] * (steps[None] - steps[:, None])
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))
        return self.linear(f"{block}attn.out_proj", torch.einsum("nqk,knh->qnh", scores.softmax(-1), v).reshape(t, d))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(
            x, self.weights[f"transformer.{name}.weight"], self.weights.get(f"transformer.{name}.bias")
        )

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"transformer.{name}.weight"]
        return functional.layer_norm(x, weight.shape, weight, self.weights.get(f"transformer.{name}.bias"), 1e-5)


def slopes_of(n_heads: int, bias_max: float) -> list[float]:
    """ALiBi's slopes: powers of two down to 2^-bias_max; other counts take every second of the next power's first."""
    power = 1
    while power < n_heads:
        power *= 2
    slopes = [2 ** (-bias_max * (i + 1) / power) for i in range(power)]
    return slopes if power == n_heads else (slopes[1::2] + slopes[::2])[:n_heads]


def random_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights large enough for every part of the model to matter; norms around one."""
    is_norm = any(part in name for part in ("norm", "ln_", "_ln", "layernorm")) and name.endswith("weight")
    return torch.randn(shape) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5) + (1.0 if is_norm else 0.0)
