"""What a padded call gives back, under transformers' names, and how it is made of what a flat pass left behind.

Keys and values are this rank's: a layer is (k, v), [B, local k/v heads, time, head] each, or (k, v, cross k, cross v)
with an encoder, or the cache that was handed in (transformers_cache.py); one shared k/v head is on every rank.
Attentions are gathered over the heads, in global order; everything else is the same on every rank. B batch, T time, D
model, V vocabulary, N heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from parallel.ranks.collectives import gather_from
from tp_decoders.model.decoder import Decoder
from tp_decoders.padded.flat_tokens import EncoderPadding, Padding

KeyValues = tuple[tuple[Tensor, ...], ...]


class Output:
    """Read by name, by index among what is there, or as a tuple; like transformers' outputs."""

    def to_tuple(self) -> tuple[object, ...]:
        """What is there, in order."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | str) -> object:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[object]:
        return iter(self.to_tuple())


@dataclass(frozen=True, kw_only=True, eq=False)
class StatesOutput(Output):
    """last_hidden_state [B, T, D] is normalised; hidden_states holds the embeddings, what each block but the last
    gives, and last_hidden_state.
    """

    last_hidden_state: Tensor
    past_key_values: KeyValues | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalOutput(Output):
    """loss is the mean over the labels that count; logits [B, T, V] are float32."""

    loss: Tensor | None = None
    logits: Tensor
    past_key_values: KeyValues | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


def padded_keys_values(
    padding: Padding, new: dict[int, tuple[Tensor, Tensor]], past: KeyValues | None
) -> list[tuple[Tensor, ...]]:
    """By layer (k, v), the past's columns and then the new ones."""
    layers = []
    for layer in sorted(new):
        kv = tuple(padding.pad(x).transpose(1, 2) for x in new[layer])
        if past is not None:
            kv = tuple(torch.cat((old, x), 2) for old, x in zip(past[layer][:2], kv, strict=True))
        layers.append(kv)
    return layers


def gathered_attentions(model: Decoder, padding: Padding, weights: dict[int, list[Tensor]]) -> tuple[Tensor, ...]:
    """[B, N, T, past + T] of every layer. One gather per layer."""
    total = padding.past_BP.shape[1] + padding.new_BT.shape[1]
    return tuple(
        gather_from(
            padding.pad_weights(weights[layer], padding.columns, total),
            model.group,
            model.heads(layer).shards.sizes,
            1,
        )
        for layer in sorted(weights)
    )


def gathered_cross_attentions(
    model: Decoder, states: EncoderPadding, weights: dict[int, list[Tensor]]
) -> tuple[Tensor, ...]:
    """[B, N, T, S] of every layer. One gather per layer."""
    num_states, padding = states.seen_BQS.shape[2], states.padding
    sizes = Decoder.heads(model, 0).shards.sizes  # pruning leaves these heads alone
    keys, gathered = [states.columns[row] for row in padding.rows], []
    for layer in sorted(weights):
        own = padding.pad_weights([weights[layer][row] for row in padding.rows], keys, num_states)
        gathered.append(gather_from(own, model.group, sizes, 1))
    return tuple(gathered)


def reorder_cache(past: Any, beam_ids: Tensor) -> Any:
    """The past of other rows: row i becomes what row beam_ids[i] was. A cache of transformers' changes in place."""
    if not isinstance(past, tuple | list):
        past.reorder_cache(beam_ids)
        return past
    return tuple(tuple(x.index_select(0, beam_ids.to(x.device)) for x in layer) for layer in past)
