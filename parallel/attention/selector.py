"""Which attention backend runs: asked for by name, or the best one that the device and the model allow.

eager: plain torch, anything. cpu: the C++ kernel, same bits everywhere. sdpa: torch's scaled_dot_product_attention.
flash: CUDA only. A name that cannot work is refused with the reason; the caller logs the chosen backend's name.
"""

from __future__ import annotations

import logging

import torch

from parallel.attention.cpu import Cpu
from parallel.attention.eager import Eager
from parallel.attention.flash import Flash, package
from parallel.attention.metadata import Backend
from parallel.attention.sdpa import Sdpa
from parallel.errors import ConfigError, NativeUnavailable
from parallel.native.library import library
from parallel.native.operands import DTYPES
from parallel.options import BACKENDS

__all__ = ["BACKENDS", "Backend", "backend_named", "choose_backend"]

_BEST = {"cpu": ("cpu", "sdpa", "eager"), "cuda": ("flash", "sdpa", "eager")}
_log = logging.getLogger(__name__)


def backend_named(name: str) -> Backend:
    """The backend of that name, without asking whether it can run here."""
    made: dict[str, type[Backend]] = {"eager": Eager, "cpu": Cpu, "sdpa": Sdpa, "flash": Flash}
    if name not in made:
        raise ConfigError(
            f"attention backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}, or none for the best one"
        )
    return made[name]()


def choose_backend(
    requested: str | None,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    alibi: bool,
    head_dim: int,
) -> Backend:
    """The requested backend, or with None the best available one; ConfigError where the request is impossible."""
    device = torch.device(device)
    if requested is not None:
        backend = backend_named(requested)
        if reason := _obstacle(requested, device, dtype, alibi, head_dim):
            raise ConfigError(f"attention backend {requested} was asked for, but {reason}")
        return backend
    for name in _BEST.get(device.type, ("sdpa", "eager")):
        reason = _obstacle(name, device, dtype, alibi, head_dim)
        if reason is None:
            return backend_named(name)
        _log.warning("attention backend %s cannot be used: %s", name, reason)
    raise AssertionError("eager has no obstacle")


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, alibi: bool, head_dim: int) -> str | None:
    """Why this backend cannot run, and what to do about it; None where it can."""
    if name == "cpu":
        return _cpu_obstacle(device, dtype)
    if name == "flash":
        return _flash_obstacle(device, dtype, alibi, head_dim)
    return None


def _cpu_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU only and the device is {device}; use flash or sdpa"
    if dtype not in DTYPES:
        return f"it has no kernel for {dtype}; use float32 or bfloat16, or the backend sdpa"
    try:
        library()
    except NativeUnavailable as error:
        return f"{error} (sdpa and eager work without it; results then depend on the batch)"
    return None


def _flash_obstacle(device: torch.device, dtype: torch.dtype, alibi: bool, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device and the device is {device}; use cpu, sdpa or eager"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it has no kernel for {dtype}; use bfloat16 or float16, or the backend sdpa"
    if head_dim > 256 or head_dim % 8:
        return f"heads are {head_dim} wide and it takes multiples of 8 up to 256; use the backend sdpa"
    if alibi and package() is None:
        return "ALiBi needs the flash-attn package, which is missing; install tp-decoders[cuda] or use the backend sdpa"
    return None
