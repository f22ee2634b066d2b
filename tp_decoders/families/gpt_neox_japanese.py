"""GPT-NeoX-Japanese: rotary positions, sequential residual, no biases but one, tied head.

The one bias, `dense_bias`, belongs to the last layer's attention output and is added once, after the reduction. The
MLP is intermediate_multiple_size times as wide as the model. T tokens, D model, N local heads, H head, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from parallel.attention.attend import AttentionSpec
from parallel.attention.forward_pass import Pass
from parallel.attention.heads import HeadLayout
from parallel.layers.dropout import ATTENDED, MLP, DropoutSite
from parallel.layers.linear import ColumnLinear, RowLinear
from parallel.layers.norm import LayerNorm
from parallel.layers.rotary import rotated
from parallel.ranks.group import Group
from tp_decoders.families.family import Family
from tp_decoders.families.gpt_neox import NAMES as NEOX_NAMES
from tp_decoders.families.gpt_neox import neox_from_hf
from tp_decoders.files.json_fields import MOST_RATIO, Fields
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.place import Place
from tp_decoders.model.tensor_names import Name, NameMap

DEFAULTS = {
    "hidden_size": 2560, "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 32000, "rotary_pct": 1.0,
    "attention_dropout": 0.1, "tie_word_embeddings": True,
}  # fmt: skip


def from_hf(fields: Fields) -> DecoderConfig:
    multiple = fields.number("intermediate_multiple_size", 4, above=0.0, within=(0.0, MOST_RATIO))
    config = neox_from_hf(fields, DEFAULTS, int(fields.integer("hidden_size", DEFAULTS["hidden_size"]) * multiple))
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

    def forward(self, x_TD: Tensor, now: Pass) -> Tensor:
        q_TNH, k_TNH, v_TNH = rotated(self.qkv(self.ln1(x_TD, now), now).unflatten(1, self.heads), now.rotation)
        o_TNH = now.attended(self.attention, q_TNH, k_TNH, v_TNH)
        h_TD = x_TD + self.drop_attended(self.out(o_TNH.flatten(1), now), now)
        mlp = self.down(self.up(self.ln2(h_TD, now), now, self.activation), now)
        return h_TD + self.drop_mlp(mlp, now)


class Model(Decoder):
    """GPT-NeoX-Japanese with its language-modelling head."""

    def __init__(self, config: DecoderConfig, group: Group, place: Place) -> None:
        layout = HeadLayout.of(group, config.n_heads, config.n_kv_heads, config.head_dim)
        super().__init__(config, group, place, lambda layer: Block(config, layer, layout, group, place))


BIAS = "blocks.{i}.out.bias"
NAMES = (
    *(name for name in NEOX_NAMES if name.ours != BIAS),
    Name("layers.{i}.attention.dense_bias", BIAS),
)

FAMILY = Family(
    types={"gpt_neox_japanese": "GPTNeoXJapanese"},
    from_hf=from_hf,
    model=Model,
    names=NameMap("gpt_neox_japanese.", NAMES),
    tokenizer="GPTNeoXJapaneseTokenizer",
    integers=("intermediate_multiple_size",),
)
