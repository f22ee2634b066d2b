"""One AdamW update on the CPU: the wrapper of adamw.cpp.

Reads and writes every buffer once. Which parameters decay, what the learning rate is and how gradients are clipped is
the caller's; so is telling autograd that a parameter was written to.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from parallel.exact import whole_power
from parallel.native.compiled.library import entry
from parallel.native.operands import apart, refused, succeeded, words, written


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The numbers of one update. `step` counts from 1; gradients are multiplied by `scale` first."""

    step: int
    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    scale: float = 1.0


class _Update(ctypes.Structure):
    """Update of adamw.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("master", "grad", "first", "second", "copy")),
        ("n", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("scale", "rate", "beta1", "beta2")),
        *((name, ctypes.c_float) for name in ("epsilon", "decay", "step_size", "root")),
    )


def update(
    master: Tensor, grad: Tensor, first: Tensor, second: Tensor, rates: Rates, copy: Tensor | None = None
) -> None:
    """master and both moments, contiguous float32 on the CPU and of one size, are updated in place; `copy`, bfloat16,
    gets the new master rounded (arXiv 1711.05101, algorithm 2, with decay times the learning rate as in torch).
    """
    shape = master.shape
    for name, given in (("master", master), ("grad", grad), ("first", first), ("second", second)):
        _contiguous(name, given, shape, torch.float32)
    apart("adamw", "master", master, grad, first, second)
    apart("adamw", "first", first, grad, second)
    apart("adamw", "second", second, grad)
    if copy is not None:
        _contiguous("copy", copy, shape, torch.bfloat16)
        apart("adamw", "copy", copy, master, grad, first, second)
    correction1, correction2 = (1.0 - whole_power(beta, rates.step) for beta in (rates.beta1, rates.beta2))
    pointers = master.data_ptr(), grad.data_ptr(), first.data_ptr(), second.data_ptr()
    status = _function()(
        ctypes.byref(
            _Update(
                *pointers, None if copy is None else copy.data_ptr(), master.numel(), rates.scale, rates.learning_rate,
                rates.beta1, rates.beta2, rates.epsilon, rates.weight_decay, rates.learning_rate / correction1,
                math.sqrt(correction2),
            )
        )
    )  # fmt: skip
    succeeded("adamw", status)


def _contiguous(name: str, given: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of one size, in whatever shape: the update goes through them element by element."""
    if given.numel() != math.prod(shape):
        raise refused("adamw", name, words(given), f"it must have as many elements as the master, {math.prod(shape)}")
    written("adamw", name, given, given.shape, dtype)


@cache
def _function() -> Callable[..., int]:
    return entry("adamw_update", (ctypes.c_void_p,), ctypes.c_int)
