"""GPT-NeoX-Japanese: rotary positions, sequential residual, no biases but one, tied head.

The one bias, `dense_bias`, belongs to the last layer's attention output and is added once, after the reduction. The
MLP is intermediate_multiple_size times as wide as the model. T tokens, D model, N local heads, H head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from parallel.attention.attend import Attend, AttentionSpec
from parallel.attention.heads import HeadLayout
from parallel.layers.dropout import ATTENDED, MLP, DropoutSite
from parallel.layers.linear import ColumnLinear, RowLinear
from parallel.layers.norm import LayerNorm
from parallel.ranks.group import Group
from parallel.sharding.rules import VirtualShards
from tp_decoders.files.json_fields import MOST_LAYERS, MOST_RATIO, Fields
from tp_decoders.model.config import DecoderConfig, Dropout, activation, head_size, probability
from tp_decoders.model.decoder import Decoder, Family
from tp_decoders.model.place import Place
from tp_decoders.model.rotary import Rotary, RotaryConfig, Rotation, rotary_from_hf, rotated
from tp_decoders.model.tensor_names import Name, NameMap


@dataclass(frozen=True, kw_only=True)
class Options:
    rotary: RotaryConfig


def from_hf(fields: Fields) -> DecoderConfig:
    d_model = fields.integer("hidden_size", 2560)
    n_heads = fields.integer("num_attention_heads", 32)
    head_dim = head_size(fields.where, d_model, n_heads)
    rotary = rotary_from_hf(fields, head_dim, fields.integer("max_position_embeddings", 2048), default_share=1.0)
    config = DecoderConfig(
        model_type="gpt_neox_japanese",
        n_layers=fields.integer("num_hidden_layers", 32, most=MOST_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        d_model=d_model,
        d_ff=int(d_model * fields.number("intermediate_multiple_size", 4, above=0.0, within=(0.0, MOST_RATIO))),
        vocab_size=fields.integer("vocab_size", 32000),
        max_positions=rotary.reach,
        activation=activation(fields, "hidden_act", "gelu"),
        norm_eps=fields.number("layer_norm_eps", 1e-5, above=0.0),
        tie=fields.flag("tie_word_embeddings", True),
        initializer_range=fields.number("initializer_range", 0.02, within=(0.0, 1e6)),
        dropout=Dropout(
            attention=probability(fields, "attention_dropout", 0.1), residual=probability(fields, "hidden_dropout", 0.0)
        ),
        options=Options(rotary=rotary),
        hf=fields.values,
    )
    fields.finish()
    return config


class Block(nn.Module):
    """h = x + attention(ln1 x);  h + mlp(ln2 h)."""

    def __init__(self, config: DecoderConfig, layer: int, layout: HeadLayout, group: Group, place: Place) -> None:
        super().__init__()
        d, is_last = config.d_model, layer == config.n_layers - 1
        ffn = group.shards(config.d_ff)
        p = config.dropout.attention
        self.attention = AttentionSpec(layer, config.head_dim**-0.5, None, p, layout.local_ids)
        self.heads = (layout.n_local, 3, config.head_dim)
        self.activation = config.activation
        self.ln1 = LayerNorm(d, config.norm_eps, group=group, **place)
        self.qkv = ColumnLinear(d, layout.head_shards.scaled(3), group=group, bias=False, **place)
        self.out = RowLinear(layout.head_shards, d, group=group, bias=is_last, **place)
        self.ln2 = LayerNorm(d, config.norm_eps, group=group, **place)
        self.up = ColumnLinear(d, ffn, group=group, bias=False, **place)
        self.down = RowLinear(ffn, d, group=group, bias=False, **place)
        self.drop_attended = DropoutSite(config.dropout.residual, layer, ATTENDED, group)
        self.drop_mlp = DropoutSite(config.dropout.residual, layer, MLP, group)

    def forward(self, x_TD: Tensor, attend: Attend, rotation: Rotation, tokens: VirtualShards | None = None) -> Tensor:
        q_TNH, k_TNH, v_TNH = rotated(
            self.qkv(self.ln1(x_TD, tokens), tokens=tokens).unflatten(1, self.heads), rotation
        )
        o_TNH = attend(self.attention, q_TNH, k_TNH, v_TNH)
        h_TD = x_TD + self.drop_attended(self.out(o_TNH.flatten(1), tokens), attend.dropping, tokens)
        mlp = self.down(self.up(self.ln2(h_TD, tokens), self.activation, tokens=tokens), tokens)
        return h_TD + self.drop_mlp(mlp, attend.dropping, tokens)


class Model(Decoder):
    """GPT-NeoX-Japanese with its language-modelling head."""

    def __init__(self, config: DecoderConfig, group: Group, place: Place) -> None:
        layout = HeadLayout.of(group, config.n_heads, config.n_kv_heads, config.head_dim)
        super().__init__(config, group, place, lambda layer: Block(config, layer, layout, group, place))
        self.rotary = Rotary(config.options.rotary)

    def given(self, positions_T: Tensor) -> tuple[Rotation]:
        return (self.rotary.at(positions_T),)


NAMES = (
    Name("embed_in.weight", "embed.weight"),
    Name("layers.{i}.input_layernorm.weight", "blocks.{i}.ln1.weight"),
    Name("layers.{i}.input_layernorm.bias", "blocks.{i}.ln1.bias"),
    Name("layers.{i}.attention.query_key_value.weight", "blocks.{i}.qkv.weight"),
    Name("layers.{i}.attention.dense.weight", "blocks.{i}.out.weight"),
    Name("layers.{i}.attention.dense_bias", "blocks.{i}.out.bias"),
    Name("layers.{i}.post_attention_layernorm.weight", "blocks.{i}.ln2.weight"),
    Name("layers.{i}.post_attention_layernorm.bias", "blocks.{i}.ln2.bias"),
    Name("layers.{i}.mlp.dense_h_to_4h.weight", "blocks.{i}.up.weight"),
    Name("layers.{i}.mlp.dense_4h_to_h.weight", "blocks.{i}.down.weight"),
    Name("final_layer_norm.weight", "norm.weight"),
    Name("final_layer_norm.bias", "norm.bias"),
    Name("embed_out.weight", "head.linear.weight", prefixed=False),
    Name("lm_head.weight", "head.linear.weight", prefixed=False),  # by the name that transformers 5 has for it
)

FAMILY = Family("gpt_neox_japanese", from_hf, Model, NameMap("gpt_neox_japanese.", NAMES))
