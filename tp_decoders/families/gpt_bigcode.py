"""GPT-BigCode: GPT-2's block with one shared K/V head (multi-query), or per-head (q, k, v) rows without it.

With multi_query the rows of `c_attn` are q, divided by heads, then one k and one v head that every rank holds; their
gradient is summed over ranks once. Without it the rows are per head (q, k, v), unlike GPT-2; only then there can be
cross-attention, whose `c_attn` has rows per head (k, v). (The reference splits those rows in a way that fits one head
only, so its own cross-attention cannot run.) T tokens, D model, N local heads, H head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from parallel.attention.attend import Attend, AttentionSpec
from parallel.attention.heads import HeadLayout
from parallel.errors import ConfigError
from parallel.layers.dropout import ATTENDED, MLP, DropoutSite
from parallel.layers.linear import ColumnLinear, RowLinear
from parallel.layers.norm import LayerNorm
from parallel.ranks.group import Group
from parallel.sharding.rules import Part, VirtualShards
from tp_decoders.files.json_fields import MOST_LAYERS, Fields
from tp_decoders.model.config import DecoderConfig, Dropout, activation, head_size, probability
from tp_decoders.model.cross_attention import CrossAttention
from tp_decoders.model.decoder import Decoder, Family, Parts, residual_std
from tp_decoders.model.place import Place
from tp_decoders.model.tensor_names import Name, NameMap, block_names

INFERENCE_HINTS = (
    "inference_runner",
    "max_batch_size",
    "max_sequence_length",
    "n_ctx",
    "pad_key_length",
    "pre_allocate_kv_cache",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
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
    d_model = fields.integer("n_embd", 768, aliases=("hidden_size",))
    n_heads = fields.integer("n_head", 12, aliases=("num_attention_heads",))
    multi_query = fields.flag("multi_query", True)
    fields.only("num_key_value_heads", 1 if multi_query else n_heads)
    config = DecoderConfig(
        model_type="gpt_bigcode",
        n_layers=fields.integer("n_layer", 12, most=MOST_LAYERS, aliases=("num_hidden_layers",)),
        n_heads=n_heads,
        n_kv_heads=1 if multi_query else n_heads,
        head_dim=head_size(fields.where, d_model, n_heads),
        d_model=d_model,
        d_ff=fields.optional_integer("n_inner") or 4 * d_model,
        vocab_size=fields.integer("vocab_size", 50257),
        max_positions=fields.integer("n_positions", 1024, aliases=("max_position_embeddings",)),
        activation=activation(fields, "activation_function", "gelu_pytorch_tanh"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, above=0.0),
        tie=fields.flag("tie_word_embeddings", True),
        initializer_range=fields.number("initializer_range", 0.02, within=(0.0, 1e6)),
        dropout=Dropout(
            embedding=probability(fields, "embd_pdrop", 0.1),
            attention=probability(fields, "attn_pdrop", 0.1),
            residual=probability(fields, "resid_pdrop", 0.1),
        ),
        options=Options(
            multi_query=multi_query,
            scale_by_head=fields.flag("scale_attn_weights", True),
            softmax_in_float32=fields.flag("attention_softmax_in_fp32", True),
            scaled_softmax_in_float32=fields.flag("scale_attention_softmax_in_fp32", True),
            cross_attention=fields.flag("add_cross_attention", False),
        ),
        hf=fields.values,
    )
    if multi_query and config.options.cross_attention:
        raise ConfigError(
            f"{fields.where}: add_cross_attention with multi_query, where all heads share one key and value; "
            "GPT-BigCode has cross-attention with multi_query = false only"
        )
    fields.finish(INFERENCE_HINTS)
    return config


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

    def forward(self, x_TD: Tensor, attend: Attend, tokens: VirtualShards | None = None) -> Tensor:
        q_TNH, k_TKH, v_TKH = self.split(self.qkv(x_TD, tokens=tokens))
        return self.out(attend(self.spec, q_TNH, k_TKH, v_TKH).flatten(1), tokens)

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

    def forward(self, x_TD: Tensor, attend: Attend, tokens: VirtualShards | None = None) -> Tensor:
        attended = self.attention(self.ln1(x_TD, tokens), attend, tokens)
        h_TD = x_TD + self.drop_attended(attended, attend.dropping, tokens)
        if self.cross is not None and attend.encoder is not None:
            h_TD = h_TD + self.cross.drop(self.cross(h_TD, attend.encoder, tokens), attend.dropping, tokens)
        mlp = self.down(self.up(self.ln2(h_TD, tokens), self.activation, tokens=tokens), tokens)
        return h_TD + self.drop_mlp(mlp, attend.dropping, tokens)


class Model(Decoder):
    """GPT-BigCode with its language-modelling head."""

    takes_token_types = True
    init_std = staticmethod(residual_std)

    def __init__(self, config: DecoderConfig, group: Group, place: Place) -> None:
        layout = HeadLayout.of(group, config.n_heads, config.n_kv_heads, config.head_dim)
        parts = Parts(learned_positions=True)
        super().__init__(config, group, place, lambda layer: Block(config, layer, layout, group, place), parts)


NAMES = (
    Name("wte.weight", "embed.weight"),
    Name("wpe.weight", "positions.weight"),
    *block_names(
        "h",
        "blocks",
        {
            "ln_1": "ln1",
            "attn.c_attn": "attention.qkv",
            "attn.c_proj": "attention.out",
            "ln_cross_attn": "cross.norm",
            "crossattention.q_attn": "cross.q",
            "crossattention.c_attn": "cross.kv",
            "crossattention.c_proj": "cross.out",
            "ln_2": "ln2",
            "mlp.c_fc": "up",
            "mlp.c_proj": "down",
        },
    ),
    Name("ln_f.weight", "norm.weight"),
    Name("ln_f.bias", "norm.bias"),
    Name("lm_head.weight", "head.linear.weight", prefixed=False),
)

FAMILY = Family("gpt_bigcode", from_hf, Model, NameMap("transformer.", NAMES))
