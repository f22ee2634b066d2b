"""What the five models have in common besides their parts: a config, a group, a head, and what `train()` may mean.

Also the layers that need no sharding knowledge of their own: the learned position table. A model's forward takes flat
tokens,
    model(tokens_T, positions_T, attend, rows=None) -> logits_local [T or len(rows), V/p]
and nothing here runs a collective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from parallel.errors import ConfigError
from parallel.group import Group
from parallel.shard import Replicated, sharded
from parallel.tokens import gather_tokens, scatter_tokens, token_shards
from parallel.vocab import VocabHead
from tp_decoders.config import DecoderConfig
from tp_decoders.names import NameMap


class Place(TypedDict):
    """Where and in which type a module's parameters are made."""

    dtype: torch.dtype | None
    device: torch.device | str | None


class Decoder(nn.Module):
    """Base of the families' models. Made in eval mode; gradients flow in eval mode too."""

    head: VocabHead
    blocks: nn.ModuleList
    recompute: bool = False  # whole blocks are computed again in the backward instead of keeping their activations
    source: Path | None = None  # the folder it was loaded from: `save` takes the tokenizer's files from there

    def __init__(self, config: DecoderConfig, group: Group) -> None:
        super().__init__()
        self.config = config
        self.group = group

    def through_blocks(self, x_TD: Tensor, *given: object) -> Tensor:
        """All blocks in turn; `given` is what each of them is handed besides x. Divides the tokens between them where
        asked for.
        """
        tokens = token_shards(x_TD.shape[0], self.group)
        x_TD = scatter_tokens(x_TD, self.group, tokens)
        again = self.recompute and torch.is_grad_enabled()
        for block in self.blocks:
            x_TD = (
                checkpoint(block, x_TD, *given, tokens, use_reentrant=False) if again else block(x_TD, *given, tokens)
            )
        return gather_tokens(x_TD, self.group, tokens)

    def train(self, mode: bool = True) -> Decoder:
        if mode and self.config.dropout.any:
            raise ConfigError(
                f"train mode with {self.config.dropout}: dropout is not implemented yet and is not left out silently; "
                "stay in eval mode (gradients are computed there too), or set the probabilities in config.json to 0"
            )
        return super().train(mode)  # type: ignore[return-value]


class PositionTable(nn.Module):
    """Learned absolute positions, replicated on every rank."""

    def __init__(self, max_positions: int, d_model: int, group: Group, place: Place) -> None:
        super().__init__()
        self.weight = sharded((max_positions, d_model), Replicated(), group.rank, **place)

    def forward(self, positions_T: Tensor) -> Tensor:
        return functional.embedding(positions_T, self.weight)


@dataclass(frozen=True)
class Family:
    """What the registry knows of a family: how to read its config, build its model and name its tensors."""

    model_type: str
    from_hf: Callable[[dict[str, object]], DecoderConfig]
    model: Callable[[DecoderConfig, Group, Place], Decoder]
    names: NameMap
