"""What lasts from one step to the next, counted on a rank's shard on the meta device.

The optimiser's buffers are its own (`FlatBuffers`), so their padding is counted too. On CPUs the native kernels keep
every weight of a product packed, once for the forward and, where something before it is trained, once for the backward;
a rank that only serves has such a weight in no other form.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.training.step.flat_buffers import PIECE, FlatBuffers
from cluster.training.step.update_guard import PIECE as TRIAL
from cluster.training.step.update_guard import TRIAL_BYTES
from parallel.attention.attend import AttentionSpec
from parallel.attention.kv_cache import KVLayout
from parallel.layers.linear import ColumnLinear, RowLinear
from parallel.matmul.packed_store import releasable
from parallel.native.memory import CHUNK, PAGE, alignment
from parallel.native.packed_weight import PANEL, UNIT, units_of
from parallel.ranks.group import Group
from tp_decoders.model.adapted_layers import linears
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.rotary import build_tables


@dataclass(frozen=True, kw_only=True)
class StaticBytes:
    """`update` is what the optimiser step needs for a moment, when no activations are held."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    packed: int = 0
    update: int = 0


def training_bytes(model: Decoder, dp: Group, device: str) -> StaticBytes:
    """Of a model on the meta device whose trained parameters require gradients."""
    packed = packed_bytes(model, training=True) if device == "cpu" else 0
    weights = weight_bytes(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kinds = [{n: p for n, p in trained.items() if (p.dim() >= 2) is decays} for decays in (True, False)]
    flats = [FlatBuffers(parameters, dp, True) for parameters in kinds if parameters]
    own = sum(p.nbytes for p in trained.values() if p.dtype is torch.float32)
    masters = sum(flat.master.nbytes for flat in flats)
    moments = 2 * sum(flat.master[flat.slice].nbytes for flat in flats)
    return StaticBytes(
        weights=weights,
        gradients=sum(flat.grad.nbytes for flat in flats),
        optimizer=masters - own + moments,  # a float32 parameter is its own master
        packed=packed,
        update=_update_bytes(model, flats, dp, device),
    )


def _update_bytes(model: Decoder, flats: Sequence[FlatBuffers], dp: Group, device: str) -> int:
    """The largest temporary of a step: a piece of a buffer summed or gathered over dp, the squares of one leaf, a trial
    of the update in pieces, or a piece's scaled gradient where torch's kernel takes it.
    """
    largest = max(parameter.numel() for flat in flats for parameter in flat.parameters.values())
    trial = TRIAL_BYTES * min(largest, TRIAL)
    scaled = 4 * min(PIECE, max(flat.master.numel() // dp.size for flat in flats)) if device == "cuda" else 0
    leaf = max((layer.weight.numel() * 4 // max(1, len(layer.borders) - 1) for layer in _rows(model)), default=0)
    leaf = max(leaf, trial, scaled)
    if dp.size == 1:
        return leaf
    piece = 4 * dp.size * min(PIECE, max(flat.master.numel() // dp.size for flat in flats))  # of all ranks together
    copies = 2.0 + 2.0 / dp.size if device == "cuda" else 1.0 + 1.0 / dp.size  # gathered through a padded buffer there
    return max(leaf, int(copies * piece))


def weight_bytes(model: Decoder) -> int:
    """Parameters, and what is derived from the configuration alone: rotary tables and slopes."""
    rotary = model.config.rotary
    tables = vars(build_tables(rotary)) if rotary is not None else {}
    specs = {id(v): v for m in model.modules() for v in vars(m).values() if isinstance(v, AttentionSpec)}
    slopes = sum(spec.slopes.nbytes for spec in specs.values() if spec.slopes is not None)
    return sum(p.nbytes for p in model.parameters()) + sum(table.nbytes for table in tables.values()) + slopes


def released_bytes(model: Decoder) -> int:
    """Of the parameters whose plain form a rank that only serves gives back on a CPU."""
    weights = {id(layer.weight): layer.weight for layer in linears(model).values()}
    return sum(weight.nbytes for weight in weights.values() if releasable(weight))


def packed_bytes(model: Decoder, training: bool) -> int:
    """Copies of the weights in the kernels' layout: the pages of the arena that they touch."""
    forward, backward = _operands(model)
    sizes = [packed_size(*operand) for operand in (forward + backward[::-1] if training else forward)]
    touched: set[tuple[int, int]] = set()
    chunk, room, used = 0, 0, 0
    for nbytes in sizes:  # as native.memory.Arena hands them out
        align = alignment(nbytes)
        start = -(-used // align) * align
        if start + nbytes > room:
            chunk, room, start = chunk + 1, -(-max(CHUNK, nbytes) // PAGE) * PAGE, 0
        used = start + nbytes
        touched.update((chunk, page) for page in range(start // PAGE, -(-used // PAGE)))
    return len(touched) * PAGE


Operand = tuple[int, int, Sequence[int], torch.dtype]
"""Outputs, reduced axis, its borders, type."""


def _operands(model: Decoder) -> tuple[list[Operand], list[Operand]]:
    """Every matrix that the forward packs, and those that the backward does."""
    forward: list[Operand] = []
    backward: list[Operand] = []
    for layer in model.modules():
        if isinstance(layer, ColumnLinear):
            forward.append((layer.weight.shape[0], layer.d_in, (0, layer.d_in), layer.weight.dtype))
            for part in layer.parts:
                borders = part.shards.local_borders(layer.group.rank) if part.shards else (0, part.size)
                backward.append((layer.d_in, borders[-1], borders, layer.weight.dtype))
        elif isinstance(layer, RowLinear):
            forward.append((layer.d_out, layer.weight.shape[1], layer.borders, layer.weight.dtype))
            backward.append((layer.weight.shape[1], layer.d_out, (0, layer.d_out), layer.weight.dtype))
    return forward, backward


def packed_size(rows: int, columns: int, borders: Sequence[int], dtype: torch.dtype) -> int:
    """Rows in panels; every leaf of the reduced axis in whole blocks."""
    cuts = sorted({0, columns, *borders})
    units = sum(units_of(stop - start, dtype) for start, stop in itertools.pairwise(cuts))
    return -(-rows // PANEL) * PANEL * units * UNIT


def _rows(model: Decoder) -> list[RowLinear]:
    return [module for module in model.modules() if isinstance(module, RowLinear)]


def cache_layout(model: Decoder, block_size: int) -> KVLayout:
    """What this rank stores per block of tokens while it serves."""
    config, weight = model.config, next(model.parameters())
    by_layer = tuple(model.heads(layer).n_local_kv for layer in range(config.n_layers))
    return KVLayout(
        n_layers=config.n_layers, n_kv_heads=by_layer[0], by_layer=by_layer, head_dim=config.head_dim,
        block_size=block_size, dtype=weight.dtype, device="meta",
    )  # fmt: skip
