"""A family that was made up: learned positions, RMS norms, q, k and v of one layer, a gated MLP, tied head.

    h = x + out(attention(ln1 x));  h + down(silu(gate(ln2 h)) * up(ln2 h))

All there is to it is in this file; registered, everything else must work. T tokens, D model, N local heads, H head.
"""

from __future__ import annotations

from torch import Tensor, nn

from parallel.attention.attend import AttentionSpec
from parallel.attention.forward_pass import Pass
from parallel.attention.heads import HeadLayout
from parallel.layers.linear import ColumnLinear, RowLinear, columns
from parallel.layers.norm import RMSNorm
from parallel.matmul.activation import gated
from parallel.ranks.group import Group
from parallel.sharding.rules import Part
from tp_decoders.families.family import Family
from tp_decoders.files.json_fields import MOST_LAYERS, Fields
from tp_decoders.model.config import DecoderConfig, activation, head_size
from tp_decoders.model.decoder import Decoder, Parts
from tp_decoders.model.place import Place
from tp_decoders.model.tensor_names import Name, NameMap, block_names


def from_hf(fields: Fields) -> DecoderConfig:
    d_model, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    config = DecoderConfig(
        model_type="seventh",
        n_layers=fields.integer("num_hidden_layers", most=MOST_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_size(fields.where, d_model, n_heads),
        d_model=d_model,
        d_ff=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        max_positions=fields.integer("max_position_embeddings"),
        positions="learned",
        activation=activation(fields, "hidden_act", "silu"),
        norm_eps=fields.number("rms_norm_eps", 1e-6, above=0.0),
        tie=True,
        hf=fields.values,
    )
    fields.finish()
    return config


class Block(nn.Module):
    """h = x + attention(ln1 x);  h + down(f(gate) * up), both of ln2 h."""

    def __init__(self, config: DecoderConfig, layer: int, group: Group, place: Place) -> None:
        super().__init__()
        layout = HeadLayout.of(group, config.n_heads, config.n_kv_heads, config.head_dim)
        d, ffn, heads = config.d_model, group.shards(config.d_ff), layout.head_shards
        self.attention = AttentionSpec(layer, config.head_dim**-0.5, None, 0.0, layout.local_ids)
        self.heads, self.activation = (3, layout.n_local, config.head_dim), config.activation
        self.ln1, self.ln2 = (RMSNorm(d, config.norm_eps, group=group, **place) for _ in range(2))
        self.qkv = ColumnLinear(d, (Part(heads.size, heads),) * 3, group=group, bias=False, **place)
        self.out = RowLinear(heads, d, group=group, bias=False, **place)
        self.gate, self.up = (ColumnLinear(d, ffn, group=group, bias=False, **place) for _ in range(2))
        self.down = RowLinear(ffn, d, group=group, bias=False, **place)

    def forward(self, x_TD: Tensor, now: Pass) -> Tensor:
        q_TNH, k_TNH, v_TNH = self.qkv(self.ln1(x_TD, now), now).unflatten(1, self.heads).unbind(1)
        h_TD = x_TD + self.out(now.attended(self.attention, q_TNH, k_TNH, v_TNH).flatten(1), now)
        gate_TF, up_TF = columns(self.ln2(h_TD, now), now, self.gate, self.up)
        return h_TD + self.down(gated(gate_TF, up_TF, self.activation, now.recipes), now)


class Model(Decoder):
    def __init__(self, config: DecoderConfig, group: Group, place: Place) -> None:
        parts = Parts(norm=RMSNorm)
        super().__init__(config, group, place, lambda layer: Block(config, layer, group, place), parts)


NAMES = (
    Name("tokens.weight", "embed.weight"),
    Name("places.weight", "positions.weight"),
    *block_names(
        "layers",
        "blocks",
        {
            "norm1": "ln1", "attention.qkv": "qkv", "attention.o": "out", "norm2": "ln2", "gate": "gate", "up": "up",
            "down": "down",
        },
    ),
    Name("norm.weight", "norm.weight"),
    Name("lm_head.weight", "head.linear.weight", prefixed=False),
)  # fmt: skip

FAMILY = Family(types={"seventh": "Seventh"}, from_hf=from_hf, model=Model, names=NameMap("seventh.", NAMES))
