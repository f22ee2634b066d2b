"""GPT-BigCode: GPT-2's block with one shared K/V head (multi-query), or per-head (q, k, v) rows without it.

With multi_query the rows of `c_attn` are q, divided by heads, then one k and one v head that every rank holds; their
gradient is summed over ranks once. Without it the rows are per head (q, k, v), unlike GPT-2; only then there can be
cross-attention, whose `c_attn` has rows per head (k, v). (The reference splits those rows in a way that fits one head
only, so its own cross-attention cannot run.) T tokens, D model, N local heads, H head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from parallel.attention.attend import AttentionSpec
from parallel.attention.forward_pass import Pass
from parallel.attention.heads import HeadLayout
from parallel.errors import ConfigError
from parallel.layers.dropout import ATTENDED, MLP, DropoutSite
from parallel.layers.linear import ColumnLinear, RowLinear
from parallel.layers.norm import LayerNorm
from parallel.ranks.group import Group
from parallel.sharding.rules import Part
from tp_decoders.families.family import Family
from tp_decoders.families.gpt2 import SIZES, UNREAD, gpt_from_hf, gpt_names
from tp_decoders.files.json_fields import Fields
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.cross_attention import CrossAttention
from tp_decoders.model.decoder import Decoder, residual_std
from tp_decoders.model.place import Place
from tp_decoders.model.tensor_names import NameMap

INFERENCE_HINTS = (
    *("inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length", "pre_allocate_kv_cache"),
    "validate_runner_input",
)
"""Settings of an earlier runner for the same weights."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The two float32 softmax options say where transformers rounds; every attention backend here scores in float32."""

    multi_query: bool
    scale_by_head: bool
    softmax_in_float32: bool
    scaled_softmax_in_float32: bool
    cross_attention: bool = False


def from_hf(fields: Fields) -> DecoderConfig:
    config = gpt_from_hf(fields, "gelu_pytorch_tanh")
    options = Options(
        multi_query=fields.flag("multi_query", True),
        scale_by_head=fields.flag("scale_attn_weights", True),
        softmax_in_float32=fields.flag("attention_softmax_in_fp32", True),
        scaled_softmax_in_float32=fields.flag("scale_attention_softmax_in_fp32", True),
        cross_attention=fields.flag("add_cross_attention", False),
    )
    n_kv_heads = 1 if options.multi_query else config.n_heads
    fields.only("num_key_value_heads", n_kv_heads)
    if options.multi_query and options.cross_attention:
        raise ConfigError(
            f"{fields.where}: add_cross_attention with multi_query, where all heads share one key and value; "
            "GPT-BigCode has cross-attention with multi_query = false only"
        )
    fields.finish((*UNREAD, *INFERENCE_HINTS))
    return replace(config, n_kv_heads=n_kv_heads, options=options)


class Attention(nn.Module):
    """Queries by head against one shared K/V head, or against their own."""

    def __init__(self, config: DecoderConfig, layer: int, layout: HeadLayout, group: Group, place: Place) -> None:
        super().__init__()
        d, head_dim, heads = config.d_model, config.head_dim, layout.head_shards
        scale = head_dim**-0.5 if config.options.scale_by_head else 1.0
        p, kv = config.dropout.attention, layout.kv_heads(group)
        self.spec = AttentionSpec(layer, scale, None, p, layout.local_ids, kv)
        self.layout, self.shared = layout, layout.shares_kv
        parts = (Part(d, heads), layout.kv_part, layout.kv_part) if self.shared else heads.scaled(3)
        self.qkv = ColumnLinear(d, parts, group=group, **place)
        self.out = RowLinear(heads, d, group=group, **place)

    def forward(self, x_TD: Tensor, now: Pass) -> Tensor:
        q_TNH, k_TKH, v_TKH = self.split(self.qkv(x_TD, now))
        return self.out(now.attended(self.spec, q_TNH, k_TKH, v_TKH).flatten(1), now)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n_local, head_dim = self.layout.n_local, self.layout.head_dim
        if not self.shared:
            q_TNH, k_TNH, v_TNH = qkv.unflatten(1, (n_local, 3, head_dim)).unbind(2)
            return q_TNH, k_TNH, v_TNH
        heads = qkv.unflatten(1, (n_local + 2, head_dim))  # [T, N/p local query heads, k, v]
        q_TNH, k_T1H, v_T1H = heads.split((n_local, 1, 1), 1)
        return q_TNH, k_T1H, v_T1H


class Block(nn.Module):
    """h = x + attention(ln1 x);  with an encoder's states h = h + cross(h);  h + mlp(ln2 h)."""

    def __init__(self, config: DecoderConfig, layer: int, layout: HeadLayout, group: Group, place: Place) -> None:
        super().__init__()
        ffn = group.shards(config.d_ff)
        self.activation = config.activation
        self.ln1 = LayerNorm(config.d_model, config.norm_eps, group=group, **place)
        self.attention = Attention(config, layer, layout, group, place)
        self.ln2 = LayerNorm(config.d_model, config.norm_eps, group=group, **place)
        self.up = ColumnLinear(config.d_model, ffn, group=group, **place)
        self.down = RowLinear(ffn, config.d_model, group=group, **place)
        self.cross = None
        if config.options.cross_attention:
            self.cross = CrossAttention(config, layer, self.attention.spec.scale, "heads", group, place)
        self.drop_attended = DropoutSite(config.dropout.residual, layer, ATTENDED, group)
        self.drop_mlp = DropoutSite(config.dropout.residual, layer, MLP, group)

    def forward(self, x_TD: Tensor, now: Pass) -> Tensor:
        h_TD = x_TD + self.drop_attended(self.attention(self.ln1(x_TD, now), now), now)
        if self.cross is not None and now.encoder is not None:
            h_TD = h_TD + self.cross(h_TD, now)
        mlp = self.down(self.up(self.ln2(h_TD, now), now, self.activation), now)
        return h_TD + self.drop_mlp(mlp, now)


class Model(Decoder):
    """GPT-BigCode with its language-modelling head."""

    takes_token_types = True
    init_std = staticmethod(residual_std)

    def __init__(self, config: DecoderConfig, group: Group, place: Place) -> None:
        layout = HeadLayout.of(group, config.n_heads, config.n_kv_heads, config.head_dim)
        super().__init__(config, group, place, lambda layer: Block(config, layer, layout, group, place))


FAMILY = Family(
    types={"gpt_bigcode": "GPTBigCode"},
    from_hf=from_hf,
    model=Model,
    names=NameMap("transformer.", gpt_names("attention.qkv", "attention.out")),
    tokenizer="GPT2Tokenizer",
    integers=SIZES,
)
