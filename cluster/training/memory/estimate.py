"""One rank's memory by kind, from what lasts (lasting_memory.py) and what a micro-batch takes (pass_memory.py).

A step is at its worst either in a pass, with all activations held, or in the update, with none: the larger counts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from cluster.training.memory.lasting_memory import (
    StaticBytes,
    cache_layout,
    packed_bytes,
    released_bytes,
    training_bytes,
    weight_bytes,
)
from cluster.training.memory.pass_memory import PassCost, PassShape, Prepare, forward_peak, pass_cost
from parallel.options import Recompute
from parallel.ranks.group import Group, Numerics
from tp_decoders.adapters.lora import place, targeted, their_module
from tp_decoders.checkpoint.load_save import build
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.lora_config import LoraConfig

RUNTIME = {"cpu": 400 << 20, "cuda": 2 << 30}
"""Of a process before it holds a tensor: code, threads and the ranks' shared memory on CPUs (measured: 310 to 330 MiB
without Ray); context, libraries and NCCL's buffers on GPUs (an assumption).
"""
SERVED_ROWS = 320
"""Tokens of one step whose logits are wanted: the engine's defaults for sequences and scored positions together."""
BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is spread and what is kept."""

    tp: int = 1
    dp: int = 1
    recompute: Recompute = "none"
    sequence_parallel: bool = False

    @property
    def name(self) -> str:
        extras = [f"recompute {self.recompute}"] if self.recompute != "none" else []
        extras += ["sequence-parallel"] if self.sequence_parallel else []
        return ", ".join([f"tp={self.tp} x dp={self.dp}", *extras])


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is the same in every layout: the type, the device, a micro-batch's tokens, which weights are trained."""

    tokens: int
    dtype: torch.dtype
    device: str
    numerics: Numerics = "invariant"
    lora: LoraConfig | None = None

    @property
    def prepare(self) -> Prepare | None:
        lora = self.lora
        if lora is None:
            return None
        return lambda model: place(
            model, lora, {name: lora.rank_of(their_module(model, name)) for name in targeted(model, lora.targets)}
        )


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank at its worst moment, by kind. Workspace is what is held for a moment only."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    packed: int = 0
    activations: int = 0
    kv_cache: int = 0
    workspace: int = 0
    runtime: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(config: DecoderConfig, layout: Layout, setup: Setup, rank: int = 0) -> RankMemory:
    """Of one tensor-parallel rank; its dp ranks are alike."""
    return joined(lasting(config, layout.tp, layout.dp, setup, rank), passing(config, layout, setup, rank), setup)


def lasting(config: DecoderConfig, tp: int, dp: int, setup: Setup, rank: int = 0) -> StaticBytes:
    """What a rank holds from step to step."""
    return training_bytes(shard(config, tp, setup, rank), Group(0, dp), setup.device)


def passing(config: DecoderConfig, layout: Layout, setup: Setup, rank: int = 0) -> PassCost:
    """What a micro-batch takes, and the collectives a rank issues for it."""
    shape = PassShape(
        rank=rank, tp=layout.tp, tokens=setup.tokens, dtype=setup.dtype, device=setup.device,
        recompute=layout.recompute, sequence_parallel=layout.sequence_parallel, numerics=setup.numerics,
    )  # fmt: skip
    return pass_cost(config, shape, setup.prepare)


def joined(static: StaticBytes, cost: PassCost, setup: Setup) -> RankMemory:
    """Both as one rank's memory."""
    worst = max(cost.peak, static.update)
    activations = min(cost.kept, worst)
    return RankMemory(
        weights=static.weights, gradients=static.gradients, optimizer=static.optimizer, packed=static.packed,
        activations=activations, workspace=worst - activations, runtime=RUNTIME[setup.device],
    )  # fmt: skip


def serving_memory(config: DecoderConfig, tp: int, setup: Setup, cached_tokens: int, rank: int = 0) -> RankMemory:
    """Of one rank that serves steps of `setup.tokens` tokens with a cache of `cached_tokens`."""
    model, on_cpu = shard(config, tp, setup, rank), setup.device == "cpu"
    shape = PassShape(rank=rank, tp=tp, tokens=setup.tokens, dtype=setup.dtype, device=setup.device)
    return RankMemory(
        weights=weight_bytes(model) - (released_bytes(model) if on_cpu else 0),
        packed=packed_bytes(model, training=False) if on_cpu else 0,
        kv_cache=-(-cached_tokens // BLOCK) * cache_layout(model, BLOCK).bytes_per_block,
        workspace=forward_peak(config, shape, min(SERVED_ROWS, setup.tokens)),
        runtime=RUNTIME[setup.device],
    )


def shard(config: DecoderConfig, tp: int, setup: Setup, rank: int) -> Decoder:
    """One rank's part of the model, as shapes."""
    model = build(config, Group(rank, tp, numerics=setup.numerics), setup.dtype, "meta")
    if setup.prepare is not None:
        setup.prepare(model)
    return model
