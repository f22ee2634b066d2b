"""What the models have in common besides their parts: a config, a group, a head, the way through the blocks.

Also the layers that need no sharding knowledge of their own: the learned position table. A model's forward takes flat
tokens,
    model(tokens_T, now, rows=None) -> logits_local [T or len(rows), V/p]
and nothing here runs a collective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from parallel.attention.forward_pass import Pass
from parallel.attention.heads import HeadLayout
from parallel.errors import ConfigError
from parallel.layers.dropout import EMBEDDED, EMBEDDING, PLAIN, DropoutSite, LayerPass
from parallel.layers.norm import LayerNorm, Norm
from parallel.options import Recompute
from parallel.ranks.group import Group
from parallel.ranks.sequence_parallel import gather_tokens, scatter_tokens, token_shards
from parallel.recompute import Recipes
from parallel.sharding.rules import Replicated, sharded
from parallel.vocabulary.vocab_parallel import VocabEmbedding, VocabHead
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.lora_config import LoraConfig
from tp_decoders.model.place import Place
from tp_decoders.model.resize_embeddings import VocabularyTables
from tp_decoders.model.rotary import Rotary
from tp_decoders.model.task_heads import task_head


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a family has around its blocks besides what all have."""

    norm: Callable[..., Norm] = LayerNorm
    logit_scale: float = 1.0


def plain_std(config: DecoderConfig, name: str) -> float:
    """The standard deviation that a fresh matrix, by our name for it, is drawn with."""
    return config.initializer_range


def residual_std(config: DecoderConfig, name: str) -> float:
    """The same, with projections onto the residual stream smaller by sqrt(2 x layers) (Radford et al. 2019)."""
    projects = name.endswith(("out.weight", "down.weight"))
    return config.initializer_range * ((2 * config.n_layers) ** -0.5 if projects else 1.0)


class Decoder(VocabularyTables):
    """Base of the families' models. Made in eval mode, where gradients flow too; activations are dropped in passes
    that bring masks, whatever the mode.
    """

    recompute: Recompute = "none"  # what of its blocks is computed again in the backward instead of being kept
    lora: LoraConfig | None = None  # of the adapters beside the weights, if there are any (tp_decoders.adapters.lora)
    takes_token_types: bool = False  # added to the embeddings, looked up in the vocabulary
    prunable: bool = False  # of heads, as model/pruning does it
    init_std: Callable[[DecoderConfig, str], float] = staticmethod(plain_std)  # by our name of a matrix
    source: Path | None = None  # the folder it was loaded from: `save` takes the tokenizer's files from there

    def __init__(
        self,
        config: DecoderConfig,
        group: Group,
        place: Place,
        block: Callable[[int], nn.Module],
        parts: Parts | None = None,
    ) -> None:
        """`block` makes the block of a layer; `parts` says what else the family has."""
        super().__init__()
        parts = parts or Parts()
        self.config, self.group = config, group
        vocab, d_model = config.vocab_size, config.d_model
        self.embed = VocabEmbedding(vocab, d_model, group=group, **place)
        learned = config.positions == "learned"
        self.positions = PositionTable(config.max_positions, d_model, group, place) if learned else None
        self.rotary = None if config.rotary is None else Rotary(config.rotary)
        self.blocks = nn.ModuleList(block(layer) for layer in range(config.n_layers))
        self.norm = parts.norm(d_model, config.norm_eps, **place)
        self.drop = DropoutSite(config.dropout.embedding, EMBEDDED, EMBEDDING, group)
        if config.task is None or config.task.has_vocabulary:
            tied = self.embed.weight if config.tie else None
            self.head = VocabHead(vocab, d_model, group=group, weight=tied, scale=parts.logit_scale, **place)
        self.task_head = task_head(config, group, place)
        self.eval()

    def embedded(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        """[T, D]: the tokens' embeddings, and their positions' where those are learned."""
        x_TD = self.embed(tokens_T)
        return x_TD if self.positions is None else x_TD + self.positions(positions_T)

    def forward(self, tokens_T: Tensor, now: Pass, rows: Tensor | None = None) -> Tensor:
        """[T or len(rows), V/p] float32: this rank's part of the logits of all tokens, or of the given rows."""
        return self.logits(self.hidden(tokens_T, now), rows, now)

    def hidden(self, tokens_T: Tensor, now: Pass) -> Tensor:
        """[T, D]: what the last block gives, on every rank."""
        return self.through_blocks(self.embedded(tokens_T, now.positions_T), now)

    def logits(self, x_TD: Tensor, rows: Tensor | None, now: LayerPass = PLAIN) -> Tensor:
        """This rank's part of the logits of all tokens, or of the given rows."""
        if not self.has_vocabulary:
            raise ConfigError(f"a model loaded for {self.task} has no vocabulary head; load it with task='causal-lm'")
        return self.head(self.final(x_TD, rows), now.of(rows))  # type: ignore[no-any-return]

    def states(self, tokens_T: Tensor, now: Pass, rows: Tensor | None = None) -> Tensor:
        """[T or len(rows), D]: what heads are computed from, on every rank: the last hidden states, normalised."""
        return self.final(self.hidden(tokens_T, now), rows)

    def final(self, x_TD: Tensor, rows: Tensor | None = None) -> Tensor:
        """The last block's output, normalised."""
        return self.norm(x_TD if rows is None else x_TD[rows])  # type: ignore[no-any-return]

    def heads(self, layer: int) -> HeadLayout:
        """The attention heads of a layer and those of this rank."""
        return HeadLayout.of(self.group, self.config.n_heads, self.config.n_kv_heads, self.config.head_dim)

    @property
    def drops(self) -> bool:
        """Whether a pass with masks drops anything."""
        return self.config.dropout.any or (self.lora is not None and self.lora.dropout > 0.0)

    def through_blocks(self, x_TD: Tensor, now: Pass, seen: list[Tensor] | None = None) -> Tensor:
        """The embeddings' dropout and all blocks in turn. Divides the tokens between them where asked for. What every
        block is given is added to `seen`.
        """
        if self.training and now.dropping is None and self.config.dropout.any:
            raise ConfigError(
                f"train mode with {self.config.dropout}, but the pass says no masks: dropout is not left out silently; "
                "hand over Pass.packed(lengths, dropping=Dropping(seed, token_keys(...))), or call eval(), where "
                "gradients flow too"
            )
        tokens = token_shards(x_TD.shape[0], self.group)
        if tokens is not None or self.rotary is not None:
            rotation = None if self.rotary is None else self.rotary.at(now.positions_T)
            now = replace(now, tokens=tokens, rotation=rotation)
        x_TD = self.drop(scatter_tokens(x_TD, self.group, tokens), now)
        for block in self.blocks:
            if seen is not None:
                seen.append(gather_tokens(x_TD, self.group, tokens))
            x_TD = self._through(block, x_TD, now)
        return gather_tokens(x_TD, self.group, tokens)

    def _through(self, block: nn.Module, x_TD: Tensor, now: Pass) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return block(x_TD, now)  # type: ignore[no-any-return]
        if self.recompute == "full":
            return checkpoint(block, x_TD, now, use_reentrant=False)  # type: ignore[no-any-return]
        recipes = Recipes()
        with recipes.instead():
            return block(x_TD, replace(now, recipes=recipes))  # type: ignore[no-any-return]


class PositionTable(nn.Module):
    """Learned absolute positions, replicated on every rank."""

    def __init__(self, max_positions: int, d_model: int, group: Group, place: Place) -> None:
        super().__init__()
        self.weight = sharded((max_positions, d_model), Replicated(), group.rank, **place)

    def forward(self, positions_T: Tensor) -> Tensor:
        return functional.embedding(positions_T, self.weight)
