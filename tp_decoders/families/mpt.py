"""MPT: ALiBi instead of positions, no biases, q, k and v as three blocks, tied head.

The meaning of the options is llm-foundry's, who made the format: transformers 4.57 reads several (alibi,
alibi_bias_max, qk_ln, logit_scale, no_bias, learned_pos_emb, expansion_ratio, attn_type) without heeding them. With
qk_ln every layer gathers q and k once, because that norm runs over the whole width. T tokens, D model, N local heads,
K k/v heads, H head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.attention import Attend, AttentionSpec
from parallel.collectives import gather_from, scatter_to
from parallel.dropout import ATTENDED, MLP, DropoutSite
from parallel.errors import ConfigError
from parallel.group import Group
from parallel.heads import HeadLayout, alibi_slopes, share_heads
from parallel.linear import ColumnLinear, RowLinear
from parallel.norm import LayerNorm
from parallel.shard import Part, VirtualShards
from tp_decoders.config import DecoderConfig, Dropout, head_size, probability
from tp_decoders.decoder import Decoder, Family, Parts, Place
from tp_decoders.fields import Fields
from tp_decoders.names import Name, NameMap, block_names

HARMLESS = ("init_config", "init_device", "verbose", "fc_type", "use_pad_tok_in_ffn")
ATTENTION_HARMLESS = ("rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config", "tie_word_embeddings")
"""Details of a rotary embedding that is off, and what transformers writes into every nested config."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """`alibi_bias_max` is None where ALiBi is off."""

    alibi_bias_max: float | None
    learned_positions: bool
    bias: bool
    clip_qkv: float | None
    softmax_scale: float
    qk_norm: bool
    logit_scale: float


def from_hf(hf: dict[str, object]) -> DecoderConfig:
    fields = Fields(hf, "config.json (mpt)")
    d_model = fields.integer("d_model", 2048, aliases=("hidden_size",))
    n_heads = fields.integer("n_heads", 16, aliases=("num_attention_heads",))
    head_dim = head_size(fields.where, d_model, n_heads)
    attention = fields.section("attn_config") or Fields({}, f"{fields.where}: attn_config")
    shares = (
        attention.choice("attn_type", "multihead_attention", ("multihead_attention", "multiquery_attention"))
        != "multihead_attention"
    )
    attention.only("kv_n_heads", 1 if shares else n_heads, None)
    config = DecoderConfig(
        model_type="mpt",
        n_layers=fields.integer("n_layers", 24, aliases=("num_hidden_layers",)),
        n_heads=n_heads,
        n_kv_heads=1 if shares else n_heads,
        head_dim=head_dim,
        d_model=d_model,
        d_ff=_ffn_width(fields, d_model),
        vocab_size=fields.integer("vocab_size", 50368),
        max_positions=fields.integer("max_seq_len", 2048),
        activation="gelu",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, above=0.0),
        tie=fields.flag("tie_word_embeddings", True),
        initializer_range=fields.number("initializer_range", 0.02),
        dropout=Dropout(
            embedding=probability(fields, "emb_pdrop", 0.0),
            attention=probability(attention, "attn_pdrop", 0.0),
            residual=probability(fields, "resid_pdrop", 0.0),
        ),
        options=_options(fields, attention, d_model, head_dim),
        hf=hf,
    )
    _refuse_the_rest(fields, attention)
    return config


def _options(fields: Fields, attention: Fields, d_model: int, head_dim: int) -> Options:
    alibi = attention.flag("alibi", True)
    bias_max = attention.number("alibi_bias_max", 8, above=0.0)
    scale = attention.optional_number("softmax_scale")
    return Options(
        alibi_bias_max=bias_max if alibi else None,
        learned_positions=fields.flag("learned_pos_emb", True) and not alibi,
        bias=not fields.flag("no_bias", True),
        clip_qkv=attention.optional_number("clip_qkv", above=0.0),
        softmax_scale=head_dim**-0.5 if scale is None else scale,
        qk_norm=attention.flag("qk_ln", False),
        logit_scale=_logit_scale(fields, d_model),
    )


def _ffn_width(fields: Fields, d_model: int) -> int:
    ratio = fields.number("expansion_ratio", 4, above=0.0)
    if int(d_model * ratio) != d_model * ratio:
        raise ConfigError(f"{fields.where}: expansion_ratio = {ratio} times {d_model} is no whole number of columns")
    return int(d_model * ratio)


def _logit_scale(fields: Fields, d_model: int) -> float:
    value = fields.take("logit_scale", None)
    if isinstance(value, str):
        fields.choice("logit_scale", "", ("inv_sqrt_d_model",))
        return float(d_model**-0.5)
    return 1.0 if value is None else fields.number("logit_scale")


def _refuse_the_rest(fields: Fields, attention: Fields) -> None:
    """Options of llm-foundry that are understood and accepted at their neutral value only."""
    attention.only("prefix_lm", False)
    attention.only("attn_uses_sequence_id", False)
    attention.only("qk_gn", False)
    attention.only("rope", False)
    attention.only("sliding_window_size", -1, None)
    attention.only("attn_logit_softcapping", None)
    attention.only("fused_qkv", True)
    attention.finish(ATTENTION_HARMLESS)
    ffn = fields.section("ffn_config") or Fields({}, "ffn_config")
    ffn.only("ffn_type", "mptmlp")
    ffn.only("ffn_hidden_size", None)
    ffn.only("ffn_act_fn", None)
    ffn.finish(["fc_type"])
    fields.only("norm_type", "low_precision_layernorm", "layernorm")
    fields.only("embedding_fraction", 1)
    fields.only("block_overrides", None)
    fields.only("final_logit_softcapping", None)
    fields.finish(HARMLESS)


class QueryKeyNorm(nn.Module):
    """Layer norms over all heads of q and of k; one gather in the forward, one in the backward."""

    def __init__(self, config: DecoderConfig, layout: HeadLayout, group: Group, place: Place) -> None:
        super().__init__()
        self.group, self.sizes, self.shared = group, layout.head_shards.sizes, layout.shares_kv
        bias = config.options.bias
        self.q = LayerNorm(config.d_model, config.norm_eps, bias=bias, **place)
        self.k = LayerNorm(config.n_kv_heads * config.head_dim, config.norm_eps, bias=bias, **place)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """[T, local columns] each."""
        if self.shared:
            full = self.q(gather_from(q, self.group, self.sizes))
            return scatter_to(full, self.group, self.sizes), self.k(k)
        q_full, k_full = gather_from(torch.stack((q, k), 1), self.group, self.sizes).unbind(1)
        q, k = scatter_to(torch.stack((self.q(q_full), self.k(k_full)), 1), self.group, self.sizes).unbind(1)
        return q, k


class Attention(nn.Module):
    """ALiBi attention; K/V per head, or one shared head."""

    def __init__(self, config: DecoderConfig, layer: int, layout: HeadLayout, group: Group, place: Place) -> None:
        super().__init__()
        d, options = config.d_model, config.options
        self.layout, self.group, self.clip = layout, group, options.clip_qkv
        self.shared = layout.shares_kv
        slopes, p = _slopes(config, layout, place), config.dropout.attention
        self.spec = AttentionSpec(layer, options.softmax_scale, slopes, p, layout.local_ids)
        kv = Part(config.head_dim) if self.shared else Part(d, layout.head_shards)
        self.qkv = ColumnLinear(d, (Part(d, layout.head_shards), kv, kv), group=group, bias=options.bias, **place)
        self.widths = tuple(part.local_size(group.rank) for part in self.qkv.parts)
        self.norm = QueryKeyNorm(config, layout, group, place) if options.qk_norm else None
        self.out = RowLinear(layout.head_shards, d, group=group, bias=options.bias, **place)

    def forward(self, x_TD: Tensor, attend: Attend, tokens: VirtualShards | None = None) -> Tensor:
        qkv = self.qkv(x_TD, tokens=tokens)
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, k, v = qkv.split(self.widths, 1)
        if self.norm is not None:
            q, k = self.norm(q, k)
        o_TNH = attend(self.spec, self.heads(q), self.kv_heads(k), self.kv_heads(v))
        return self.out(o_TNH.flatten(1), tokens)

    def heads(self, q: Tensor) -> Tensor:
        return q.unflatten(1, (self.layout.n_local, self.layout.head_dim))

    def kv_heads(self, kv: Tensor) -> Tensor:
        return share_heads(kv[:, None], self.layout, self.group) if self.shared else self.heads(kv)


def _slopes(config: DecoderConfig, layout: HeadLayout, place: Place) -> Tensor | None:
    if config.options.alibi_bias_max is None:
        return None
    slopes = alibi_slopes(config.n_heads, config.options.alibi_bias_max, layout.local_ids)
    return slopes if str(place["device"]) == "meta" else slopes.to(place["device"])


class Block(nn.Module):
    """h = x + attention(ln1 x);  h + mlp(ln2 h)."""

    def __init__(self, config: DecoderConfig, layer: int, layout: HeadLayout, group: Group, place: Place) -> None:
        super().__init__()
        d, bias = config.d_model, config.options.bias
        ffn = group.shards(config.d_ff)
        self.activation = config.activation
        self.ln1 = LayerNorm(d, config.norm_eps, group=group, bias=bias, **place)
        self.attention = Attention(config, layer, layout, group, place)
        self.ln2 = LayerNorm(d, config.norm_eps, group=group, bias=bias, **place)
        self.up = ColumnLinear(d, ffn, group=group, bias=bias, **place)
        self.down = RowLinear(ffn, d, group=group, bias=bias, **place)
        self.drop_attended = DropoutSite(config.dropout.residual, layer, ATTENDED, group)
        self.drop_mlp = DropoutSite(config.dropout.residual, layer, MLP, group)

    def forward(self, x_TD: Tensor, attend: Attend, tokens: VirtualShards | None = None) -> Tensor:
        attended = self.attention(self.ln1(x_TD, tokens), attend, tokens)
        h_TD = x_TD + self.drop_attended(attended, attend.dropping, tokens)
        mlp = self.down(self.up(self.ln2(h_TD, tokens), self.activation, tokens=tokens), tokens)
        return h_TD + self.drop_mlp(mlp, attend.dropping, tokens)


class Model(Decoder):
    """MPT with its language-modelling head."""

    def __init__(self, config: DecoderConfig, group: Group, place: Place) -> None:
        layout = HeadLayout.of(group, config.n_heads, config.n_kv_heads, config.head_dim)
        parts = Parts(
            learned_positions=config.options.learned_positions,
            norm_bias=config.options.bias,
            logit_scale=config.options.logit_scale,
        )
        super().__init__(config, group, place, lambda layer: Block(config, layer, layout, group, place), parts)


NAMES = (
    Name("wte.weight", "embed.weight"),
    Name("wpe.weight", "positions.weight"),
    *block_names(
        "blocks",
        "blocks",
        {
            "norm_1": "ln1",
            "attn.Wqkv": "attention.qkv",
            "attn.q_ln": "attention.norm.q",
            "attn.k_ln": "attention.norm.k",
            "attn.out_proj": "attention.out",
            "norm_2": "ln2",
            "ffn.up_proj": "up",
            "ffn.down_proj": "down",
        },
    ),
    Name("norm_f.weight", "norm.weight"),
    Name("norm_f.bias", "norm.bias"),
    Name("lm_head.weight", "head.linear.weight", prefixed=False),
)

FAMILY = Family("mpt", from_hf, Model, NameMap("transformer.", NAMES))
