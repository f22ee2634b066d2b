"""One AdamW update on the CPU: the wrapper of adamw.cpp.

Reads and writes every buffer once. Which parameters decay, what the learning rate is and how gradients are clipped is
the caller's; so is telling autograd that a parameter was written to.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.native.library import library


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
    for name, given in (("master", master), ("grad", grad), ("first", first), ("second", second)):
        _check(name, given, master, torch.float32)
    if copy is not None:
        _check("copy", copy, master, torch.bfloat16)
    correction1, correction2 = 1.0 - rates.beta1**rates.step, 1.0 - rates.beta2**rates.step
    pointers = master.data_ptr(), grad.data_ptr(), first.data_ptr(), second.data_ptr()
    _function()(
        ctypes.byref(
            _Update(
                *pointers, None if copy is None else copy.data_ptr(), master.numel(), rates.scale, rates.learning_rate,
                rates.beta1, rates.beta2, rates.epsilon, rates.weight_decay, rates.learning_rate / correction1,
                math.sqrt(correction2),
            )
        )
    )  # fmt: skip


def _check(name: str, given: Tensor, master: Tensor, dtype: torch.dtype) -> None:
    if given.dtype is not dtype or given.numel() != master.numel() or not given.is_contiguous() or not given.is_cpu:
        raise ConfigError(
            f"{name} is a {list(given.shape)} {given.dtype} tensor on {given.device}; the native update takes "
            f"contiguous {dtype} on the CPU with {master.numel()} elements"
        )


@cache
def _function() -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    function = library().adamw_update
    function.argtypes, function.restype = (ctypes.c_void_p,), None
    return function
