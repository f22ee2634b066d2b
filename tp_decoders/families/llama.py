"""Llama, and what transformers configures like it: Mistral, Qwen2, Qwen3. RMS norms, rotary positions, groups of
queries that share a key/value head, a gated MLP.

    h = x + out(attention(ln1 x));  h + down(f(gate(ln2 h)) * up(ln2 h))

The model types differ in their biases, in Qwen3's norm of every query and key head, in defaults, and in who has a
sliding window: attention over one is refused where it would leave a position out. q, k and v are layers of their own,
as adapters name them; their backward shares one reduction, and so does that of gate and up. T tokens, D model, N local
heads, K local key/value heads, H head, F MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from parallel.attention.attend import AttentionSpec
from parallel.attention.forward_pass import Pass
from parallel.attention.heads import HeadLayout
from parallel.attention.query_key_norm import QueryKeyNorm
from parallel.errors import ConfigError
from parallel.layers.linear import ColumnLinear, RowLinear, columns
from parallel.layers.norm import RMSNorm
from parallel.layers.rotary import rotate
from parallel.matmul.activation import gated
from parallel.ranks.group import Group
from parallel.sharding.rules import Part
from tp_decoders.families.family import Family
from tp_decoders.files.json_fields import MOST_LAYERS, Fields
from tp_decoders.model.config import DecoderConfig, Dropout, activation, head_size, probability
from tp_decoders.model.decoder import Decoder, Parts
from tp_decoders.model.place import Place
from tp_decoders.model.rotary_config import NAMES as ROTARY_NAMES
from tp_decoders.model.rotary_config import rotary_from_hf
from tp_decoders.model.task_config import CAUSAL, SEQUENCES, TOKENS
from tp_decoders.model.tensor_names import Name, NameMap, block_names

SLIDING = "sliding_attention"
UNREAD = ("pretraining_tp",)
"""How the original checkpoint was divided: the same sums in another order."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One model type's defaults. `biases`: of q, k and v, and of the projection after them; None: as attention_bias and
    mlp_bias say.
    """

    vocab_size: int
    d_ff: int
    positions: int
    kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False
    windows: str = "none"  # in which layers there is one: none, all, or as use_sliding_window and layer_types say


KINDS = {
    "llama": Kind(vocab_size=32000, d_ff=11008, positions=2048, mlp_bias=None),
    "mistral": Kind(
        vocab_size=32000, d_ff=14336, positions=2**17, kv_heads=8, qkv_bias=False, out_bias=False, windows="all"
    ),
    "qwen2": Kind(
        vocab_size=151936, d_ff=22016, positions=2**15, kv_heads=32, qkv_bias=True, out_bias=False, windows="said"
    ),
    "qwen3": Kind(
        vocab_size=151936, d_ff=22016, positions=2**15, kv_heads=32, head_dim=128, qk_norm=True, windows="said"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool


def from_hf(fields: Fields) -> DecoderConfig:
    model_type = str(fields.values["model_type"])
    kind = KINDS[model_type]
    d_model, n_heads = fields.integer("hidden_size", 4096), fields.integer("num_attention_heads", 32)
    head_dim = _head_dim(fields, kind, d_model, n_heads)
    positions = fields.integer("max_position_embeddings", kind.positions)
    rotary = rotary_from_hf(fields, head_dim, positions, 1.0, ROTARY_NAMES)
    if rotary.size != head_dim:
        raise fields.refuse("partial_rotary_factor", "1.0, since the family turns whole heads", rotary.size / head_dim)
    n_layers = fields.integer("num_hidden_layers", 32, most=MOST_LAYERS)
    config = DecoderConfig(
        model_type=model_type,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=_kv_heads(fields, kind, n_heads),
        head_dim=head_dim,
        d_model=d_model,
        d_ff=fields.integer("intermediate_size", kind.d_ff),
        vocab_size=fields.integer("vocab_size", kind.vocab_size),
        max_positions=rotary.reach,
        positions="rotary",
        rotary=rotary,
        activation=activation(fields, "hidden_act", "silu"),
        norm_eps=fields.number("rms_norm_eps", 1e-6, above=0.0),
        tie=fields.flag("tie_word_embeddings", False),
        initializer_range=fields.number("initializer_range", 0.02, within=(0.0, 1e6)),
        dropout=Dropout(attention=probability(fields, "attention_dropout", 0.0)),
        options=Options(
            qkv_bias=_flag(fields, "attention_bias", kind.qkv_bias),
            out_bias=_flag(fields, "attention_bias", kind.out_bias),
            mlp_bias=_flag(fields, "mlp_bias", kind.mlp_bias),
            qk_norm=kind.qk_norm,
        ),
        hf=fields.values,
    )
    _refuse_windows(fields, kind, n_layers, rotary.reach)
    fields.finish(UNREAD)
    return config


def _flag(fields: Fields, key: str, fixed: bool | None) -> bool:
    return fields.flag(key, False) if fixed is None else fixed


def _head_dim(fields: Fields, kind: Kind, d_model: int, n_heads: int) -> int:
    """The config's own, which need not make d_model of all heads; the type's where it says none."""
    if "head_dim" in fields.values or kind.head_dim is None:
        return fields.optional_integer("head_dim", most=2**14) or head_size(fields.where, d_model, n_heads)
    return kind.head_dim


def _kv_heads(fields: Fields, kind: Kind, n_heads: int) -> int:
    """As many as there are heads where the config says null."""
    key = "num_key_value_heads"
    given = fields.optional_integer(key) if key in fields.values else kind.kv_heads
    if given is not None and n_heads % given:
        raise fields.refuse(key, f"a divisor of num_attention_heads = {n_heads}, or null for {n_heads}", given)
    return given or n_heads


def _refuse_windows(fields: Fields, kind: Kind, n_layers: int, reach: int) -> None:
    """A window as long as the longest sequence leaves nothing out; a shorter one makes another model."""
    if kind.windows == "none":
        return
    window = None
    if "sliding_window" not in fields.values or fields.take("sliding_window") is not None:
        window = fields.integer("sliding_window", 4096)
    sliding = list(range(n_layers)) if kind.windows == "all" else _sliding_layers(fields, n_layers)
    if window is not None and sliding and window < reach:
        raise ConfigError(
            f"{fields.where}: sliding_window = {window} in {len(sliding)} of {n_layers} layers, for a context of "
            f"{reach}: attention over a window is not supported. For sequences of at most {window} the window leaves "
            f"nothing out: give max_position_embeddings = {window}; sliding_window = null makes another model"
        )


def _sliding_layers(fields: Fields, n_layers: int) -> list[int]:
    uses, first = fields.flag("use_sliding_window", False), fields.integer("max_window_layers", 28, least=0)
    given: Any = fields.take("layer_types", None)
    if given is None:
        return list(range(min(first, n_layers), n_layers)) if uses else []
    accepted = ("full_attention", SLIDING) if uses else ("full_attention",)
    if not isinstance(given, list) or len(given) != n_layers or any(kind not in accepted for kind in given):
        more = "" if uses else f" ({SLIDING} needs use_sliding_window = true)"
        raise fields.refuse("layer_types", f"a list of {n_layers} of {' and '.join(accepted)}{more}")
    return [layer for layer, kind in enumerate(given) if kind == SLIDING]


class Attention(nn.Module):
    """Grouped queries, rotated; Qwen3's are normalised first."""

    def __init__(self, config: DecoderConfig, layer: int, layout: HeadLayout, group: Group, place: Place) -> None:
        super().__init__()
        d, heads, options = config.d_model, layout.head_shards, config.options
        p, kv = config.dropout.attention, layout.kv_part
        self.spec = AttentionSpec(layer, config.head_dim**-0.5, None, p, layout.local_ids, layout.kv_heads(group))
        self.layout = layout
        self.q, self.k, self.v = (
            ColumnLinear(d, (part,), group=group, bias=options.qkv_bias, **place)
            for part in (Part(heads.size, heads), kv, kv)
        )
        self.norm = QueryKeyNorm(layout, config.norm_eps, group=group, **place) if options.qk_norm else None
        self.out = RowLinear(heads, d, group=group, bias=options.out_bias, **place)

    def forward(self, x_TD: Tensor, now: Pass) -> Tensor:
        n_local, n_kv, head_dim = self.layout.n_local, self.layout.n_local_kv, self.layout.head_dim
        q, k, v = columns(x_TD, now, self.q, self.k, self.v)
        q_TNH, k_TKH = q.unflatten(1, (n_local, head_dim)), k.unflatten(1, (n_kv, head_dim))
        if self.norm is not None:
            q_TNH, k_TKH = self.norm(q_TNH, k_TKH, now)
        q_TNH, k_TKH = rotate(q_TNH, now.rotation), rotate(k_TKH, now.rotation)
        o_TNH = now.attended(self.spec, q_TNH, k_TKH, v.unflatten(1, (n_kv, head_dim)))
        return self.out(o_TNH.flatten(1), now)  # type: ignore[no-any-return]


class Block(nn.Module):
    """h = x + attention(ln1 x);  h + down(f(gate) * up), both of ln2 h."""

    def __init__(self, config: DecoderConfig, layer: int, layout: HeadLayout, group: Group, place: Place) -> None:
        super().__init__()
        d, bias, ffn = config.d_model, config.options.mlp_bias, group.shards(config.d_ff)
        self.activation = config.activation
        self.ln1 = RMSNorm(d, config.norm_eps, group=group, **place)
        self.attention = Attention(config, layer, layout, group, place)
        self.ln2 = RMSNorm(d, config.norm_eps, group=group, **place)
        self.gate, self.up = (ColumnLinear(d, ffn, group=group, bias=bias, **place) for _ in range(2))
        self.down = RowLinear(ffn, d, group=group, bias=bias, **place)

    def forward(self, x_TD: Tensor, now: Pass) -> Tensor:
        h_TD = x_TD + self.attention(self.ln1(x_TD, now), now)
        gate_TF, up_TF = columns(self.ln2(h_TD, now), now, self.gate, self.up)
        return h_TD + self.down(gated(gate_TF, up_TF, self.activation, now.recipes), now)  # type: ignore[no-any-return]


class Model(Decoder):
    """A Llama with its language-modelling head."""

    def __init__(self, config: DecoderConfig, group: Group, place: Place) -> None:
        layout = HeadLayout.of(group, config.n_heads, config.n_kv_heads, config.head_dim)
        parts = Parts(norm=RMSNorm)
        super().__init__(config, group, place, lambda layer: Block(config, layer, layout, group, place), parts)


NAMES = (
    Name("embed_tokens.weight", "embed.weight"),
    *block_names(
        "layers",
        "blocks",
        {
            "input_layernorm": "ln1",
            "self_attn.q_proj": "attention.q",
            "self_attn.k_proj": "attention.k",
            "self_attn.v_proj": "attention.v",
            "self_attn.q_norm": "attention.norm.q",
            "self_attn.k_norm": "attention.norm.k",
            "self_attn.o_proj": "attention.out",
            "post_attention_layernorm": "ln2",
            "mlp.gate_proj": "gate",
            "mlp.up_proj": "up",
            "mlp.down_proj": "down",
        },
    ),
    Name("norm.weight", "norm.weight"),
    Name("lm_head.weight", "head.linear.weight", prefixed=False),
)

FAMILY = Family(
    types={"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"},
    from_hf=from_hf,
    model=Model,
    names=NameMap("model.", NAMES),
    tasks=(CAUSAL, SEQUENCES, TOKENS),  # the decoder has another name in transformers' classes for spans
    task_layers={TOKENS: "score"},
    lora_targets=("attention.q", "attention.k", "attention.v"),
)
