"""GPT-2: learned positions, attention then MLP, everything with biases, tied head; cross-attention between them where
add_cross_attention asks for it, and layers with some heads pruned.

Checkpoints store the matrices of a block [in, out]; the columns of `c_attn` are three blocks q, k, v (two, k and v, in
cross-attention). One forward reduces three kinds of partial sums: the embedding once, and twice per layer, or three
times with an encoder's states. T tokens, D model, N local heads, H head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from parallel.attention.attend import AttentionSpec
from parallel.attention.forward_pass import Pass
from parallel.attention.heads import HeadLayout
from parallel.layers.dropout import ATTENDED, MLP, DropoutSite
from parallel.layers.linear import ColumnLinear, RowLinear
from parallel.layers.norm import LayerNorm
from parallel.ranks.group import Group
from parallel.sharding.rules import Part
from tp_decoders.families.family import Family
from tp_decoders.files.json_fields import MOST_LAYERS, Fields
from tp_decoders.model.config import DecoderConfig, Dropout, activation, head_size, probability
from tp_decoders.model.cross_attention import CrossAttention
from tp_decoders.model.decoder import Decoder, residual_std
from tp_decoders.model.place import Place
from tp_decoders.model.pruning import pruned_from_hf
from tp_decoders.model.task_config import TASKS
from tp_decoders.model.tensor_names import Name, NameMap, block_names

UNREAD = (
    *("n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout"),
    "summary_proj_to_labels",
)
"""The context's older name, and what double heads read."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """`reorder_and_upcast` asks for float32 attention scores, which every attention backend here computes anyway."""

    scale_by_head: bool
    scale_by_inverse_layer: bool
    reorder_and_upcast: bool
    cross_attention: bool = False
    pruned: tuple[tuple[int, ...], ...] = ()  # by layer, ascending; empty: none in any

    def scale(self, layer: int, head_dim: int) -> float:
        scale = head_dim**-0.5 if self.scale_by_head else 1.0
        return scale / (layer + 1) if self.scale_by_inverse_layer else scale


def from_hf(fields: Fields) -> DecoderConfig:
    config = gpt_from_hf(fields, "gelu_new")
    options = Options(
        scale_by_head=fields.flag("scale_attn_weights", True),
        scale_by_inverse_layer=fields.flag("scale_attn_by_inverse_layer_idx", False),
        reorder_and_upcast=fields.flag("reorder_and_upcast_attn", False),
        cross_attention=fields.flag("add_cross_attention", False),
        pruned=pruned_from_hf(fields, config.n_layers, config.n_heads),
    )
    fields.only("attention_head_type", None, "multihead")  # the name of multi-query before GPT-BigCode was one
    fields.finish((*UNREAD, "predict_special_tokens"))
    return replace(config, options=options)


def gpt_from_hf(fields: Fields, default_activation: str) -> DecoderConfig:
    """What GPT-2 and GPT-BigCode say in the same words; without `options`, and with K/V heads for every head."""
    d_model = fields.integer("n_embd", 768, aliases=("hidden_size",))
    n_heads = fields.integer("n_head", 12, aliases=("num_attention_heads",))
    return DecoderConfig(
        model_type=str(fields.values["model_type"]),
        n_layers=fields.integer("n_layer", 12, most=MOST_LAYERS, aliases=("num_hidden_layers",)),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_size(fields.where, d_model, n_heads),
        d_model=d_model,
        d_ff=fields.optional_integer("n_inner") or 4 * d_model,
        vocab_size=fields.integer("vocab_size", 50257),
        max_positions=fields.integer("n_positions", 1024, aliases=("max_position_embeddings",)),
        positions="learned",
        activation=activation(fields, "activation_function", default_activation),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, above=0.0),
        tie=fields.flag("tie_word_embeddings", True),
        initializer_range=fields.number("initializer_range", 0.02, within=(0.0, 1e6)),
        dropout=Dropout(
            embedding=probability(fields, "embd_pdrop", 0.1),
            attention=probability(fields, "attn_pdrop", 0.1),
            residual=probability(fields, "resid_pdrop", 0.1),
        ),
        hf=fields.values,
    )


def layout_of(config: DecoderConfig, layer: int, group: Group) -> HeadLayout:
    """The heads of a layer, those that are left."""
    pruned = config.options.pruned[layer] if config.options.pruned else ()
    if pruned:
        return HeadLayout.without(pruned, group, config.n_heads, config.head_dim)
    return HeadLayout.of(group, config.n_heads, config.n_kv_heads, config.head_dim)


class Block(nn.Module):
    """h = x + attention(ln1 x);  with an encoder's states h = h + cross(h);  h + mlp(ln2 h)."""

    def __init__(self, config: DecoderConfig, layer: int, group: Group, place: Place) -> None:
        super().__init__()
        layout, ffn = layout_of(config, layer, group), group.shards(config.d_ff)
        d, heads = config.d_model, layout.head_shards
        scale, p = config.options.scale(layer, config.head_dim), config.dropout
        self.attention = AttentionSpec(layer, scale, None, p.attention, layout.local_ids)
        self.drop_attended = DropoutSite(p.residual, layer, ATTENDED, group)
        self.drop_mlp = DropoutSite(p.residual, layer, MLP, group)
        self.heads = (3, layout.n_local, config.head_dim)
        self.activation = config.activation
        self.ln1 = LayerNorm(d, config.norm_eps, group=group, **place)
        self.qkv = ColumnLinear(d, (Part(heads.size, heads),) * 3, group=group, **place)
        self.out = RowLinear(heads, d, group=group, **place)
        crosses = config.options.cross_attention
        self.cross = CrossAttention(config, layer, scale, "blocks", group, place) if crosses else None
        self.ln2 = LayerNorm(d, config.norm_eps, group=group, **place)
        self.up = ColumnLinear(d, ffn, group=group, **place)
        self.down = RowLinear(ffn, d, group=group, **place)

    def forward(self, x_TD: Tensor, now: Pass) -> Tensor:
        q_TNH, k_TNH, v_TNH = self.qkv(self.ln1(x_TD, now), now).unflatten(1, self.heads).unbind(1)
        attended = self.out(now.attended(self.attention, q_TNH, k_TNH, v_TNH).flatten(1), now)
        h_TD = x_TD + self.drop_attended(attended, now)
        if self.cross is not None and now.encoder is not None:
            h_TD = h_TD + self.cross(h_TD, now)
        mlp = self.down(self.up(self.ln2(h_TD, now), now, self.activation), now)
        return h_TD + self.drop_mlp(mlp, now)


class Model(Decoder):
    """GPT-2 with its language-modelling head."""

    takes_token_types = True
    prunable = True
    init_std = staticmethod(residual_std)

    def __init__(self, config: DecoderConfig, group: Group, place: Place) -> None:
        super().__init__(config, group, place, lambda layer: Block(config, layer, group, place))

    def heads(self, layer: int) -> HeadLayout:
        return layout_of(self.config, layer, self.group)


def gpt_names(qkv: str, out: str, transposed: Iterable[str] = ()) -> tuple[Name, ...]:
    """The tensors of GPT-2 and GPT-BigCode, by our names of the attention's two layers."""
    modules = {
        "ln_1": "ln1",
        "attn.c_attn": qkv,
        "attn.c_proj": out,
        "ln_cross_attn": "cross.norm",
        "crossattention.q_attn": "cross.q",
        "crossattention.c_attn": "cross.kv",
        "crossattention.c_proj": "cross.out",
        "ln_2": "ln2",
        "mlp.c_fc": "up",
        "mlp.c_proj": "down",
    }
    return (
        Name("wte.weight", "embed.weight"),
        Name("wpe.weight", "positions.weight"),
        *block_names("h", "blocks", modules, transposed),
        Name("ln_f.weight", "norm.weight"),
        Name("ln_f.bias", "norm.bias"),
        Name("lm_head.weight", "head.linear.weight", prefixed=False),
    )


LINEARS = (
    *("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    *("crossattention.q_attn", "crossattention.c_attn", "crossattention.c_proj"),
)
SIZES = ("n_embd", "n_head", "n_inner", "n_layer", "n_positions")

FAMILY = Family(
    types={"gpt2": "GPT2"},
    from_hf=from_hf,
    model=Model,
    names=NameMap("transformer.", gpt_names("qkv", "out", LINEARS)),
    tokenizer="GPT2Tokenizer",
    tasks=TASKS,
    integers=SIZES,
)
