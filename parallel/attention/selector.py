"""Which attention backend runs: asked for by name, or the best one that the device and the model allow.

eager: plain torch, anything. cpu: the C++ kernel, same bits everywhere. sdpa: torch's scaled_dot_product_attention.
flash: CUDA only. A name that cannot work is refused with the reason; the caller logs the chosen backend's name.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from parallel.attention.cpu import Cpu
from parallel.attention.eager import Eager
from parallel.attention.flash import Flash
from parallel.attention.metadata import Backend
from parallel.attention.sdpa import Sdpa
from parallel.errors import ConfigError
from parallel.options import BACKENDS

__all__ = ["BACKENDS", "Backend", "backend_named", "choose_backend"]

_KINDS: dict[str, type[Backend]] = {kind.name: kind for kind in (Eager, Cpu, Sdpa, Flash)}
_BEST = {"cpu": ("cpu", "sdpa", "eager"), "cuda": ("flash", "sdpa", "eager")}
_log = logging.getLogger(__name__)


def backend_named(name: str) -> Backend:
    """The backend of that name, without asking whether it can run here."""
    if name not in _KINDS:
        raise ConfigError(
            f"attention backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}, or none for the best one"
        )
    return _KINDS[name]()


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
        if reason := backend.obstacle(device, dtype, alibi, head_dim):
            raise ConfigError(f"attention backend {requested} was asked for, but {reason}")
        return backend
    for name in _BEST.get(device.type, ("sdpa", "eager")):
        reason = _KINDS[name].obstacle(device, dtype, alibi, head_dim)
        if reason is None:
            return _KINDS[name]()
        _warn(name, reason)
    raise AssertionError("eager has no obstacle")


@cache
def _warn(name: str, reason: str) -> None:
    """Once a process: a backend is chosen for every pass."""
    _log.warning("attention backend %s cannot be used: %s", name, reason)
