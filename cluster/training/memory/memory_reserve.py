"""The memory that training takes beside serving, on one rank: what must stay free of the key/value cache.

    state        gradients, masters and moments, and the weights packed for the backward on CPUs
    a load       weights, masters and moments that were read, until all ranks have theirs; a save writes in pieces
    undoing      a copy of the gradients that wait, while a call adds to them
    a pass       the worst moment of one micro-batch, and a tenth for what an estimate misses

Counted by cluster.training.memory, as `tp-decoders plan` counts.
"""

from __future__ import annotations

from cluster.training.memory.lasting_memory import packed_bytes, training_bytes
from cluster.training.memory.pass_memory import PassShape, pass_cost
from parallel.options import Recompute
from parallel.ranks.group import Group
from tp_decoders.checkpoint.load_save import build
from tp_decoders.model.decoder import Decoder

MARGIN = 1.1


def training_room(model: Decoder, micro_batch_tokens: int, recompute: Recompute, saves: bool) -> int:
    """Bytes. `saves`: states may be saved and loaded."""
    group, weight = model.group, next(model.parameters())
    device = weight.device.type
    shapes = build(model.config, Group(group.rank, group.size, numerics=group.numerics), weight.dtype, "meta")
    static = training_bytes(shapes, Group.single(), device)
    packed = static.packed - packed_bytes(shapes, training=False) if device == "cpu" else 0
    loaded = sum(parameter.nbytes for parameter in shapes.parameters()) + static.optimizer if saves else 0
    worst = max(pass_bytes(model, micro_batch_tokens, recompute), static.update)
    return static.gradients + static.optimizer + packed + max(loaded, static.gradients + worst)


def pass_bytes(model: Decoder, tokens: int, recompute: Recompute) -> int:
    """Of a forward and backward over so many tokens, at its worst moment."""
    group, weight = model.group, next(model.parameters())
    device = weight.device.type
    shape = PassShape(
        rank=group.rank, tp=group.size, tokens=tokens, dtype=weight.dtype, device=device, recompute=recompute,
        numerics="fast" if device == "cpu" else group.numerics,  # the native kernels' temporaries are those of "fast"
    )  # fmt: skip
    return int(MARGIN * pass_cost(model.config, shape).peak)
