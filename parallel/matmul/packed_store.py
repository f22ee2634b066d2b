"""The packed form as a weight's only storage: how a model that serves holds each matrix once.

`release` packs a weight and gives its plain memory back. From then on products read the packed form as before, and who
wants values calls parallel.sharding.released_weight. Only what the native kernels multiply is released: elsewhere
weights stay plain. `release_quantised` does so with whole numbers, which only those kernels multiply. No collectives.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel.errors import ConfigError, WeightReleased
from parallel.native import memory
from parallel.native.compiled import library
from parallel.native.operands import DTYPES
from parallel.native.packed_weight import PackedMatrix, Panels
from parallel.native.unpack_weight import unpack_rows
from parallel.quantisation.numbers import Numbers
from parallel.quantisation.quantised_weight import QuantisedMatrix
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


class QuantisedStore:
    """A quantised matrix: what it stands for is read as bfloat16, and nothing is written."""

    def __init__(self, matrix: QuantisedMatrix) -> None:
        self.matrix = matrix

    def values(self) -> Tensor:
        return self.matrix.values()

    def rows(self, ids_T: Tensor) -> Tensor:
        return self.matrix.rows(ids_T)

    def assign(self, values: Tensor) -> None:
        raise WeightReleased(
            f"new values [{values.shape[0]}, {values.shape[1]}] for a quantised weight would be rounded once more; "
            "change the weights first, and quantise what comes out (an adapter: tp-decoders convert --adapter)"
        )


def panels_of(weight: released_weight.ReleasedWeight) -> Panels:
    """What products with it read."""
    assert isinstance(weight.store, PackedStore | QuantisedStore), "products are with what is released here"
    return weight.store.matrix


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


def release_quantised(weight: nn.Parameter, borders: tuple[int, ...], numbers: Numbers) -> None:
    """Makes whole numbers the weight, for serving. ConfigError where nothing here multiplies them."""
    if not (weight.is_cpu and weight.dtype is torch.bfloat16 and library.available()):
        raise ConfigError(
            f"a quantised weight of type {weight.dtype} on {weight.device}: whole numbers are multiplied by the native "
            "CPU kernels, in bfloat16; leave quantisation out here"
        )
    if type(weight) is not Weight:
        raise ConfigError(f"a {type(weight).__name__} cannot be released; make it with parallel.sharding.rules.sharded")
    released_weight.release(weight, QuantisedStore(QuantisedMatrix(numbers, borders, memory.weights.take)))


def releasable(weight: Tensor) -> bool:
    """Whether a weight of this kind is released where there are native kernels; a shape will do."""
    return weight.dtype in DTYPES and weight.numel() > 0
