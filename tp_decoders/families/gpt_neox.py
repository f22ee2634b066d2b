"""GPT-NeoX: rotary positions on part of each head, parallel or sequential residual, separate head.

The rows of `query_key_value` are per head (q, k, v). With the parallel residual the partial sums of attention and MLP
are added before one reduction per layer; both are cut into the same number of leaves for that. (A pass that drops
their elements separately needs them apart: two reductions.) T tokens, D model, N
local heads, H head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from parallel.attention.attend import AttentionSpec
from parallel.attention.forward_pass import Pass
from parallel.attention.heads import HeadLayout
from parallel.layers.dropout import ATTENDED, MLP, DropoutSite
from parallel.layers.linear import ColumnLinear, Partial, RowLinear, reduce_sum
from parallel.layers.norm import LayerNorm
from parallel.layers.rotary import rotated
from parallel.ranks.group import Group
from tp_decoders.families.family import Family
from tp_decoders.files.json_fields import MOST_LAYERS, Fields
from tp_decoders.model.config import DecoderConfig, Dropout, activation, head_size, probability
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.place import Place
from tp_decoders.model.rotary_config import rotary_from_hf
from tp_decoders.model.tensor_names import Name, NameMap, block_names

EARLY_NAMES = ("attention_probs_dropout_prob", "hidden_dropout_prob")
"""Of dropout, which transformers does not read."""


@dataclass(frozen=True, kw_only=True)
class Options:
    parallel_residual: bool
    attention_bias: bool


DEFAULTS = {
    "hidden_size": 6144, "num_attention_heads": 64, "num_hidden_layers": 44, "vocab_size": 50432, "rotary_pct": 0.25,
    "attention_dropout": 0.0, "tie_word_embeddings": False,
}  # fmt: skip


def from_hf(fields: Fields) -> DecoderConfig:
    config = neox_from_hf(fields, DEFAULTS, fields.integer("intermediate_size", 24576))
    options = Options(
        parallel_residual=fields.flag("use_parallel_residual", True),
        attention_bias=fields.flag("attention_bias", True),
    )
    fields.finish(name for name in EARLY_NAMES if not fields.values.get(name))
    return replace(config, dropout=replace(config.dropout, embedding=config.dropout.residual), options=options)


def neox_from_hf(fields: Fields, defaults: Mapping[str, Any], d_ff: int) -> DecoderConfig:
    """What GPT-NeoX and GPT-NeoX-Japanese say in the same words; `options` are left out."""
    d_model = fields.integer("hidden_size", defaults["hidden_size"])
    n_heads = fields.integer("num_attention_heads", defaults["num_attention_heads"])
    head_dim = head_size(fields.where, d_model, n_heads)
    positions = fields.integer("max_position_embeddings", 2048)
    rotary = rotary_from_hf(fields, head_dim, positions, default_share=defaults["rotary_pct"])
    return DecoderConfig(
        model_type=str(fields.values["model_type"]),
        n_layers=fields.integer("num_hidden_layers", defaults["num_hidden_layers"], most=MOST_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        d_model=d_model,
        d_ff=d_ff,
        vocab_size=fields.integer("vocab_size", defaults["vocab_size"]),
        max_positions=rotary.reach,
        positions="rotary",
        rotary=rotary,
        activation=activation(fields, "hidden_act", "gelu"),
        norm_eps=fields.number("layer_norm_eps", 1e-5, above=0.0),
        tie=fields.flag("tie_word_embeddings", defaults["tie_word_embeddings"]),
        initializer_range=fields.number("initializer_range", 0.02, within=(0.0, 1e6)),
        dropout=Dropout(
            attention=probability(fields, "attention_dropout", defaults["attention_dropout"]),
            residual=probability(fields, "hidden_dropout", 0.0),
        ),
        hf=fields.values,
    )


class Block(nn.Module):
    """x + attention(ln1 x) + mlp(ln2 x), or one after the other."""

    def __init__(self, config: DecoderConfig, layer: int, layout: HeadLayout, group: Group, place: Place) -> None:
        super().__init__()
        d, bias = config.d_model, config.options.attention_bias
        ffn = group.shards(config.d_ff, num_leaves=layout.shards.num_leaves)
        p = config.dropout.attention
        self.attention = AttentionSpec(layer, config.head_dim**-0.5, None, p, layout.local_ids)
        self.heads = (layout.n_local, 3, config.head_dim)
        self.activation = config.activation
        self.parallel_residual = config.options.parallel_residual
        self.ln1 = LayerNorm(d, config.norm_eps, group=group, **place)
        self.qkv = ColumnLinear(d, layout.head_shards.scaled(3), group=group, bias=bias, **place)
        self.out = RowLinear(layout.head_shards, d, group=group, bias=bias, **place)
        self.ln2 = LayerNorm(d, config.norm_eps, group=group, **place)
        self.up = ColumnLinear(d, ffn, group=group, **place)
        self.down = RowLinear(ffn, d, group=group, **place)
        self.drop_attended = DropoutSite(config.dropout.residual, layer, ATTENDED, group)
        self.drop_mlp = DropoutSite(config.dropout.residual, layer, MLP, group)

    def forward(self, x_TD: Tensor, now: Pass) -> Tensor:
        q_TNH, k_TNH, v_TNH = rotated(self.qkv(self.ln1(x_TD, now), now).unflatten(1, self.heads), now.rotation)
        o_TNH = now.attended(self.attention, q_TNH, k_TNH, v_TNH)
        attended = self.out.partial(o_TNH.flatten(1))
        if self.parallel_residual and not self.drop_mlp.active(now):
            return x_TD + reduce_sum(now, attended, self.mlp(x_TD, now))
        h_TD = x_TD + self.drop_attended(reduce_sum(now, attended), now)
        mlp = reduce_sum(now, self.mlp(x_TD if self.parallel_residual else h_TD, now))
        return h_TD + self.drop_mlp(mlp, now)

    def mlp(self, x_TD: Tensor, now: Pass) -> Partial:
        return self.down.partial(self.up(self.ln2(x_TD, now), now, self.activation))


class Model(Decoder):
    """GPT-NeoX with its language-modelling head."""

    def __init__(self, config: DecoderConfig, group: Group, place: Place) -> None:
        layout = HeadLayout.of(group, config.n_heads, config.n_kv_heads, config.head_dim)
        super().__init__(config, group, place, lambda layer: Block(config, layer, layout, group, place))


NAMES = (
    Name("embed_in.weight", "embed.weight"),
    *block_names(
        "layers",
        "blocks",
        {
            "input_layernorm": "ln1",
            "attention.query_key_value": "qkv",
            "attention.dense": "out",
            "post_attention_layernorm": "ln2",
            "mlp.dense_h_to_4h": "up",
            "mlp.dense_4h_to_h": "down",
        },
    ),
    Name("final_layer_norm.weight", "norm.weight"),
    Name("final_layer_norm.bias", "norm.bias"),
    Name("embed_out.weight", "head.linear.weight", prefixed=False),
    Name("lm_head.weight", "head.linear.weight", prefixed=False),  # by the name that transformers 5 has for it
)

FAMILY = Family(
    types={"gpt_neox": "GPTNeoX"},
    from_hf=from_hf,
    model=Model,
    names=NameMap("gpt_neox.", NAMES),
    tokenizer="GPTNeoXTokenizer",
)
