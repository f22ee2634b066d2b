"""How much arithmetic a training step is, and how much this machine could do: model FLOP utilisation.

    per token   2 per weight forward + 2 for the gradient of its input + 2 for its own, if it is trained: 6 N
    attention   of a sequence of t tokens 6 L t^2 n_heads head_dim, the causal half of 12 L t^2 n_heads head_dim

N are the weights of matrix products: a head tied to the embedding counts, an embedding's look-up does not (Chowdhery
et al. 2022, appendix B, which counts the whole attention square). What recomputation adds is not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from parallel.matmul.products import Operand, Term, product
from parallel.sharding.rules import full_shape_of
from tp_decoders.model.decoder import Decoder

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 2, 2, 2
MEASURE_S = 0.5
CUDA_SIZE = 8192
CORE_SIZE = 512
"""Matrices of this size keep a core busy for a few milliseconds: a busy machine interrupts not all of many products."""


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of a forward and backward of the whole model: its weights' per token, and what the
    square of a sequence's length is multiplied by.
    """

    per_token: int
    per_square: int

    @staticmethod
    def of(model: Decoder) -> ModelFlops:
        config = model.config
        per_token = sum(
            (FORWARD + INPUT_GRADIENT + (WEIGHT_GRADIENT if trained else 0)) * count
            for count, trained in _matrices(model)
        )
        return ModelFlops(per_token, 6 * config.n_layers * config.n_heads * config.head_dim)

    def __call__(self, lengths: Sequence[int]) -> int:
        """Of packed sequences of these lengths."""
        return self.per_token * sum(lengths) + self.per_square * sum(length * length for length in lengths)


def num_parameters(model: Decoder) -> int:
    """Of the whole model, whatever this rank holds of it."""
    return sum(math.prod(full_shape_of(parameter)) for parameter in model.parameters())


def _matrices(model: Decoder) -> list[tuple[int, bool]]:
    """(weights, trained) of every matrix that a token is multiplied by."""
    looked_up = {id(model.embed.weight)}
    if model.positions is not None:
        looked_up.add(id(model.positions.weight))
    if model.has_vocabulary:
        looked_up.discard(id(model.head.linear.weight))  # tied: it is looked up and multiplied by
    return [
        (math.prod(full_shape_of(parameter)), parameter.requires_grad)
        for parameter in model.parameters()
        if parameter.dim() >= 2 and id(parameter) not in looked_up
    ]


@torch.no_grad()
def product_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = MEASURE_S) -> float:
    """Operations per second of a large matrix product, now, with this process's threads: the best of many, by torch
    and by the layers' own kernels, of which on some processors the one and on some the other is far faster.
    """
    size = product_size(device)
    a = torch.full((size, size), 0.5, dtype=dtype, device=device)
    b = torch.full((size, size), 0.5, dtype=dtype, device=device)
    out = torch.empty_like(a)
    terms = [Term(a, Operand(b, (0, size)))]
    fastest = min(
        _shortest(lambda: torch.matmul(a, b, out=out), device, seconds / 2),
        _shortest(lambda: product(terms), device, seconds / 2),
    )
    return 2 * size**3 / fastest


def _shortest(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Of many runs within so many seconds, after one that may still prepare something."""
    work()
    best = float("inf")
    began = time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def product_size(device: torch.device) -> int:
    """How large matrices must be to show what the device, or this process's threads, can do."""
    return CUDA_SIZE if device.type == "cuda" else CORE_SIZE * math.ceil(math.sqrt(torch.get_num_threads()))


def product_name(device: torch.device, dtype: torch.dtype) -> str:
    """What `product_ceiling` multiplies, in words."""
    size = product_size(device)
    return f"a measured product of two {size} x {size} {str(dtype).removeprefix('torch.')} matrices"
