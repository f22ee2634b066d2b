"""Low-rank adapters (LoRA) on a model's linear layers: which layers, of what rank and scale; merged into the weights
and taken out again.

    attach -> train -> save_adapter (peft_files)           load_adapter -> merge -> serve, or save as a whole checkpoint

Layers are chosen as PEFT's `target_modules` chooses them, by the checkpoint's module names ("c_attn", "mlp.c_proj",
"query_key_value", "all-linear"), or by ours ("qkv", "down"). Attaching freezes everything else. How a branch is divided
and computed is parallel.layers.low_rank's; PEFT's files are peft_files'. No collectives.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

import torch

from parallel.errors import ConfigError
from parallel.layers.dropout import ADAPTER, DropoutSite
from parallel.layers.linear import ColumnLinear
from parallel.layers.low_rank import ColumnAdapter, RowAdapter
from parallel.sharding.released_weight import is_released
from parallel.sharding.rules import full_shape_of, rule_of
from tp_decoders.model.adapted_layers import adapted, is_merged, linears
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.lora_config import LoraConfig
from tp_decoders.model.tensor_names import TASK_HEAD
from tp_decoders.registry import family_of

ALL_LINEAR = "all-linear"
HEAD = "head.linear"


def their_module(model: Decoder, ours: str) -> str:
    """The name transformers has for one of our linear layers."""
    return family_of(model.config.model_type).names.theirs(f"{ours}.weight")[1].removesuffix(".weight")


def attach(model: Decoder, config: LoraConfig, seed: int = 0) -> None:
    """Fresh adapters to train: A uniform within 1/sqrt(inputs), B zero; the same full tensors at every parallel
    size.
    """
    chosen = targeted(model, config.targets)
    place(model, config, {name: config.rank_of(their_module(model, name)) for name in chosen})
    for name, layer, adapter in adapted(model):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}.adapter.a".encode()))
        rank, d_in = full_shape_of(adapter.a)
        full = torch.empty((rank, d_in)).uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator)
        with torch.no_grad():
            adapter.a.copy_(rule_of(adapter.a).take(full, layer.group.rank))
            adapter.b.zero_()


def place(model: Decoder, config: LoraConfig, ranks: Mapping[str, int]) -> None:
    """Adapters without values at the given layers, {our name: rank}; everything else is frozen."""
    if model.lora is not None:
        raise ConfigError("the model has an adapter already; detach it first")
    layers = linears(model)
    model.requires_grad_(False)
    for number, (name, layer) in enumerate(layers.items()):
        if (rank := ranks.get(name)) is None:
            continue
        scale = config.scale_of(their_module(model, name), rank)
        site = DropoutSite(config.dropout, number, ADAPTER, layer.group) if config.dropout else None
        if isinstance(layer, ColumnLinear):
            layer.adapter = ColumnAdapter(layer.weight, layer.parts, layer.group, rank, scale, site)
        else:
            layer.adapter = RowAdapter(layer.weight, layer.shards, layer.group, rank, scale, site)
    model.lora = config


def targeted(model: Decoder, targets: tuple[str, ...] | str | None) -> list[str]:
    """Our names of the layers that the targets name."""
    names = {ours: their_module(model, ours) for ours in linears(model)}
    if isinstance(targets, str) and targets.lower() != ALL_LINEAR:
        found = [ours for ours, theirs in names.items() if re.fullmatch(targets, theirs)]
        return found or _refuse((targets,), names)
    if targets is None:
        usual = family_of(model.config.model_type).lora_targets
        return [ours for ours in names if any(ends_with(ours, target) for target in usual)]
    wanted = (targets,) if isinstance(targets, str) else targets
    found, idle = [], []
    for target in wanted:
        if target.lower() == ALL_LINEAR:
            matching = [ours for ours in names if ours != HEAD and not ours.startswith(TASK_HEAD)]
        else:
            matching = [ours for ours, theirs in names.items() if ends_with(theirs, target) or ends_with(ours, target)]
        found += matching
        idle += [] if matching else [target]
    return _refuse(tuple(idle), names) if idle else [ours for ours in names if ours in set(found)]


def ends_with(name: str, end: str) -> bool:
    """Whether whole components at the end of a dotted name are `end`."""
    return name == end or name.endswith(f".{end}")


def _refuse(idle: tuple[str, ...], names: Mapping[str, str]) -> list[str]:
    known = sorted({re.sub(r"^.*\.\d+\.", "", theirs) for theirs in names.values()})
    raise ConfigError(
        f"lora targets {list(idle)} name no linear layer; choose from {', '.join(known)}, or {ALL_LINEAR!r}"
    )


def merge(model: Decoder, keep_base: bool = True) -> None:
    """Adds every adapter into its weight. With `keep_base` a copy of those weights stays, and `unmerge` gives them back
    to the bit; without it `unmerge` subtracts, which rounds.
    """
    if model.lora is None:
        raise ConfigError("the model has no adapter to merge; attach or load one first")
    layers = list(adapted(model))
    if any(adapter.merged for _, _, adapter in layers):
        raise ConfigError("the adapter is merged already")
    if model.config.tie and any(name == HEAD for name, _, _ in layers):
        raise ConfigError("an adapter on the head cannot be merged: the head's weight is the embedding's, too")
    for _, layer, adapter in layers:
        adapter.merge(layer.weight, keep_base)


def unmerge(model: Decoder) -> None:
    """Takes every adapter out of its weight again."""
    if not is_merged(model):
        raise ConfigError("the model has no merged adapter; there is nothing to unmerge")
    for _, layer, adapter in adapted(model):
        adapter.unmerge(layer.weight)


def detach(model: Decoder) -> None:
    """Forgets the adapters. Weights stay as they are, so a merged adapter stays in them; those that can train do
    again."""
    for _, layer, _ in list(adapted(model)):
        layer.adapter = None
    model.lora = None
    for parameter in model.parameters():
        parameter.requires_grad_(not is_released(parameter))
