"""Which matrices of a model `quantize` rounds, and a rank's part of one as it is read.

Every matrix of a product is: the projections of attention and MLP, and the head's. A head that shares its matrix with
the embedding is no exception, so that the largest matrix of a small model shrinks too; the embedding's rows are read
from it. Embeddings of their own, norms, biases and the heads of other tasks stay as they are. With int4 the head is
int8, one scale a word, since its rows are read one by one.

Rounding is of the stored values and of whole rows (parallel.quantisation.schemes), so that no rank's part depends on
how many ranks there are. No collectives: where rows are divided a rank reads all of them.
"""

from __future__ import annotations

import torch
from torch import nn

from parallel.errors import CheckpointError, ConfigError
from parallel.options import Scheme
from parallel.quantisation.numbers import Numbers
from parallel.quantisation.schemes import quantised
from parallel.sharding.rules import full_shape_of, rule_of
from tp_decoders.checkpoint.tensor_matching import HEAD_WEIGHT
from tp_decoders.files.tensor_files import Checkpoint
from tp_decoders.model.adapted_layers import linears
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.tensor_names import TASK_HEAD

_AT_ONCE = 1 << 24  # numbers of a matrix


def schemes_of(model: Decoder, quantize: Scheme) -> dict[int, Scheme]:
    """What each weight's id() is rounded to; none of those that a rank has nothing of."""
    return {
        id(layer.weight): "int8" if f"{name}.weight" == HEAD_WEIGHT else quantize
        for name, layer in linears(model).items()
        if not name.startswith(TASK_HEAD) and layer.weight.numel()
    }


@torch.no_grad()
def quantised_shard(
    scheme: Scheme, parameter: nn.Parameter, checkpoint: Checkpoint, theirs: str, transposed: bool, rank: int
) -> Numbers:
    """The rank's part of a stored matrix, rounded; a few rows at a time. CheckpointError where one cannot be."""
    shape = full_shape_of(parameter)
    pieces = rule_of(parameter).pieces(shape, rank)
    by_rows = rule_of(parameter).dim == 0
    ranges = [piece[0] for piece in pieces] if by_rows else [slice(0, shape[0])]
    step = max(1, _AT_ONCE // max(1, shape[1]))
    parts = []
    for rows in ranges:
        for start in range(rows.start, rows.stop, step):
            index = (slice(start, min(start + step, rows.stop)), slice(0, shape[1]))
            stored = checkpoint.read(theirs, index[::-1] if transposed else index)
            try:
                whole = quantised(scheme, stored.t() if transposed else stored)
            except ConfigError as error:
                raise CheckpointError(f"{theirs} of {checkpoint.folder}: {error}") from error
            own = [whole] if by_rows else [whole.part(slice(None), piece[1]) for piece in pieces]
            parts.append(own[0] if len(own) == 1 else Numbers.joined(own, 1))
    return parts[0] if len(parts) == 1 else Numbers.joined(parts, 0)
