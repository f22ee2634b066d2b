"""The packed form as a weight's only storage: how a model that serves holds each matrix once.

`release` packs a weight and gives its plain memory back. From then on products read the packed form as before, and who
wants values calls parallel.sharding.released_weight. Only what the native kernels multiply is released: elsewhere
weights stay plain. No collectives.
"""

from __future__ import annotations

from torch import Tensor, nn

from parallel.errors import ConfigError
from parallel.native import memory
from parallel.native.compiled import library
from parallel.native.operands import DTYPES
from parallel.native.packed_weight import PackedMatrix
from parallel.native.unpack_weight import unpack_rows
from parallel.sharding import released_weight
from parallel.sharding.parameter import Weight


class PackedStore:
    """A packed matrix that follows nothing: it is the weight."""

    def __init__(self, matrix: PackedMatrix) -> None:
        self.matrix = matrix

    def values(self) -> Tensor:
        return self.matrix.unpack()

    def rows(self, ids_T: Tensor) -> Tensor:
        return unpack_rows(self.matrix, ids_T)

    def assign(self, values: Tensor) -> None:
        self.matrix.repack(values)


def release(weight: nn.Parameter, borders: tuple[int, ...], values: Tensor | None = None) -> None:
    """Makes the packed form [N, K], its K cut at the leaves' `borders`, the only storage of a weight that the native
    kernels multiply; any other only takes over the values. They are those it has, unless given.
    """
    if released_weight.is_released(weight) or not (weight.is_cpu and releasable(weight) and library.available()):
        if values is not None:
            released_weight.assign(weight, values)
        return
    if type(weight) is not Weight:
        raise ConfigError(f"a {type(weight).__name__} cannot be released; make it with parallel.sharding.rules.sharded")
    packed = PackedMatrix.pack(weight.detach() if values is None else values, borders, memory.weights.take)
    released_weight.release(weight, PackedStore(packed))


def releasable(weight: Tensor) -> bool:
    """Whether a weight of this kind is released where there are native kernels; a shape will do."""
    return weight.dtype in DTYPES and weight.numel() > 0
