"""Pruning attention heads of GPT-2: read from config.json (`pruned_heads`), or taken out of a loaded model.

    "pruned_heads": {"0": [1], "3": [0, 2]}        layer: heads, by their numbers in the unpruned model

The heads that remain are dealt anew over the ranks, so that a layer stays balanced whichever heads go. Collectives of
`prune_heads`: one gather per parameter that shrinks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from parallel.attention.heads import HeadLayout
from parallel.errors import ConfigError
from parallel.ranks.gather_parameter import whole_tensor
from parallel.ranks.group import Group
from parallel.sharding.rules import rule_of
from tp_decoders.files.json_fields import Fields
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.place import Place

Pruned = tuple[tuple[int, ...], ...]
"""By layer, ascending; empty where no layer has lost a head."""


def pruned_from_hf(fields: Fields, n_layers: int, n_heads: int) -> Pruned:
    """Reads `pruned_heads`, strictly."""
    given = fields.take("pruned_heads", None) or {}
    if not isinstance(given, Mapping) or not all(str(layer).isdecimal() for layer in given):
        raise fields.refuse("pruned_heads", "an object of layer numbers, each with a list of head numbers")
    heads: dict[int, Any] = {int(layer): ids for layer, ids in given.items()}
    for ids in heads.values():
        if not isinstance(ids, list) or any(isinstance(head, bool) or not isinstance(head, int) for head in ids):
            raise fields.refuse("pruned_heads", "lists of head numbers")
    return more_pruned((), heads, n_layers, n_heads)


def more_pruned(before: Pruned, heads: Mapping[int, Iterable[int]], n_layers: int, n_heads: int) -> Pruned:
    """What is pruned when these heads go, too; () if nothing is."""
    sets = [set(ids) for ids in before] or [set() for _ in range(n_layers)]
    for layer, ids in heads.items():
        ids = set(ids)
        if not 0 <= layer < n_layers:
            raise ConfigError(f"pruned heads of layer {layer}; the model's layers are 0 to {n_layers - 1}")
        if not ids <= set(range(n_heads)) or len(sets[layer] | ids) == n_heads:
            raise ConfigError(
                f"heads {sorted(ids)} of layer {layer} cannot be pruned: {sorted(sets[layer])} of its {n_heads} heads "
                f"are gone already, heads are numbered 0 to {n_heads - 1}, and one must be left"
            )
        sets[layer] |= ids
    return tuple(tuple(sorted(ids)) for ids in sets) if any(sets) else ()


def prune_heads(model: Decoder, heads: Mapping[int, Iterable[int]]) -> None:
    """Takes heads, {layer: numbers in the unpruned model}, out of a loaded GPT-2; those gone already stay gone.
    All ranks call this, before an optimiser or an engine is made of the model: parameters are replaced.
    """
    config = model.config
    if not model.prunable:
        raise ConfigError(f"heads of a model of type {config.model_type} cannot be pruned; GPT-2's can")
    if model.lora is not None:
        raise ConfigError("the model has an adapter, which belongs to its unpruned layers; merge and detach it first")
    pruned = more_pruned(config.options.pruned, heads, config.n_layers, config.n_heads)
    before = [model.heads(layer) for layer in range(config.n_layers)]
    table = {str(layer): list(ids) for layer, ids in enumerate(pruned) if ids}
    options = replace(config.options, pruned=pruned)
    model.config = replace(config, options=options, hf={**config.hf, "pruned_heads": table})
    for layer, old in enumerate(before):
        if old.ids != (new := model.heads(layer)).ids:
            _shrink(model.blocks[layer], model.config, layer, old, new, model.group)


@torch.no_grad()
def _shrink(block: Any, config: DecoderConfig, layer: int, old: HeadLayout, new: HeadLayout, group: Group) -> None:
    """Gives a block the attention of a pruned one, with the values of the heads that remain."""
    weight = block.qkv.weight
    small: Any = type(block)(config, layer, group, Place(dtype=weight.dtype, device=weight.device))
    had = range(old.n_heads) if old.ids is None else old.ids
    kept = torch.tensor([had.index(head) for head in new.ids or ()], device=weight.device)
    columns = (kept[:, None] * old.head_dim + torch.arange(old.head_dim, device=weight.device)).flatten()
    rows = torch.cat([columns + part * old.n_heads * old.head_dim for part in range(3)])
    _cut(block.qkv.weight, small.qkv.weight, rows, 0, group)
    _cut(block.qkv.bias, small.qkv.bias, rows, 0, group)
    _cut(block.out.weight, small.out.weight, columns, 1, group)
    small.out.bias = block.out.bias
    block.qkv, block.out = small.qkv, small.out
    block.attention, block.heads = small.attention, small.heads


def _cut(source: nn.Parameter, target: nn.Parameter, kept: Tensor, dim: int, group: Group) -> None:
    """The rank's part of the kept rows or columns of a parameter, put together on every rank."""
    whole = whole_tensor(source, group)
    target.copy_(rule_of(target).take(whole.index_select(dim, kept), group.rank))
    target.requires_grad_(source.requires_grad)
