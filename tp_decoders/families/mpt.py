"""MPT: ALiBi instead of positions, no biases, q, k and v as three blocks, tied head.

What an MPT's options mean, and to whom, is mpt_config's matter. With qk_ln every layer gathers q and k once, because
that norm runs over the whole width. T tokens, D model, N local heads, K k/v heads, H head, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from parallel.attention.attend import AttentionSpec
from parallel.attention.forward_pass import Pass
from parallel.attention.heads import HeadLayout, alibi_slopes
from parallel.layers.dropout import ATTENDED, MLP, DropoutSite
from parallel.layers.linear import ColumnLinear, RowLinear
from parallel.layers.norm import LayerNorm
from parallel.ranks.collectives import gather_from, scatter_to
from parallel.ranks.group import Group
from parallel.sharding.rules import Part
from tp_decoders.families.family import Family
from tp_decoders.families.mpt_config import REFERENCE, REFERENCES, from_hf
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.decoder import Decoder, Parts
from tp_decoders.model.place import Place
from tp_decoders.model.tensor_names import Name, NameMap, block_names


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
        self.layout, self.clip, kv = layout, options.clip_qkv, layout.kv_part
        slopes, p = _slopes(config, layout, place), config.dropout.attention
        self.spec = AttentionSpec(layer, options.softmax_scale, slopes, p, layout.local_ids, layout.kv_heads(group))
        self.qkv = ColumnLinear(d, (Part(d, layout.head_shards), kv, kv), group=group, bias=options.bias, **place)
        self.widths = tuple(part.local_size(group.rank) for part in self.qkv.parts)
        self.norm = QueryKeyNorm(config, layout, group, place) if options.qk_norm else None
        self.out = RowLinear(layout.head_shards, d, group=group, bias=options.bias, **place)

    def forward(self, x_TD: Tensor, now: Pass) -> Tensor:
        qkv = self.qkv(x_TD, now)
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, k, v = qkv.split(self.widths, 1)
        if self.norm is not None:
            q, k = self.norm(q, k)
        n_local, n_kv, head_dim = self.layout.n_local, self.layout.n_local_kv, self.layout.head_dim
        q_TNH = q.unflatten(1, (n_local, head_dim))
        k_TKH, v_TKH = k.unflatten(1, (n_kv, head_dim)), v.unflatten(1, (n_kv, head_dim))
        return self.out(now.attended(self.spec, q_TNH, k_TKH, v_TKH).flatten(1), now)


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

    def forward(self, x_TD: Tensor, now: Pass) -> Tensor:
        h_TD = x_TD + self.drop_attended(self.attention(self.ln1(x_TD, now), now), now)
        mlp = self.down(self.up(self.ln2(h_TD, now), now, self.activation), now)
        return h_TD + self.drop_mlp(mlp, now)


class Model(Decoder):
    """MPT with its language-modelling head."""

    def __init__(self, config: DecoderConfig, group: Group, place: Place) -> None:
        layout = HeadLayout.of(group, config.n_heads, config.n_kv_heads, config.head_dim)
        options = config.options
        parts = Parts(norm=partial(LayerNorm, bias=options.bias), logit_scale=options.logit_scale)
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

FAMILY = Family(
    types={"mpt": "Mpt"},
    from_hf=from_hf,
    model=Model,
    names=NameMap("transformer.", NAMES),
    tokenizer="GPTNeoXTokenizer",
    integers=(
        *("d_model", "n_heads", "n_layers", "max_seq_len", "expansion_ratio"),
        *("alibi_bias_max", "attn_pdrop"),  # numbers that transformers declares as whole ones
    ),
    floats=("clip_qkv", "embedding_fraction", "logit_scale", "softmax_scale"),
    choices={REFERENCE: REFERENCES},
)
