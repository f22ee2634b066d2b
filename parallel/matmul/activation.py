"""Element-wise activations by their Hugging Face names, the same bits wherever an element stands in its tensor.

The native kernels cover what the families use; any other name of transformers' table goes through torch, where the
last elements of a row may differ by an ulp from the same values elsewhere (torch's scalar tails), so that rows are
padded to whole vectors first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from parallel.errors import ConfigError
from parallel.native import elementwise
from parallel.native.compiled import library
from parallel.recompute import Recipes, cheap

LANES = 64


def _gelu_new(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_python": functional.gelu,
    "gelu_new": _gelu_new,
    "gelu_pytorch_tanh": _gelu_new,
    "gelu_fast": _gelu_new,
    "gelu_accurate": _gelu_new,
    "gelu_python_tanh": _gelu_new,
    "gelu_10": lambda x: functional.gelu(x).clamp(-10, 10),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "relu6": functional.relu6,
    "leaky_relu": functional.leaky_relu,
    "silu": functional.silu,
    "swish": functional.silu,
    "mish": functional.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
    "laplace": lambda x: 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * 2.0**0.5))),
}


def check_activation(name: str) -> str:
    """The name itself, or an error listing the names that exist."""
    if name not in TORCH:
        raise ConfigError(f"activation {name!r} is unknown; choose one of {', '.join(sorted(TORCH))}")
    return name


def is_native(x: Tensor, name: str) -> bool:
    """Whether the native kernel computes this activation of this tensor."""
    fits = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return fits and name in elementwise.NAMES and library.available()


def activate(x: Tensor, name: str, recipes: Recipes | None = None) -> Tensor:
    """The activation of every element; differentiable."""
    if torch.is_grad_enabled() and x.requires_grad:
        return cheap(_activate(x, name), lambda: _activate(x, name), recipes)
    return _activate(x, name)


def _activate(x: Tensor, name: str) -> Tensor:
    if is_native(x, name):
        return _Native.apply(x, name) if torch.is_grad_enabled() and x.requires_grad else elementwise.activate(x, name)
    short = -x.shape[-1] % LANES if x.device.type == "cpu" else 0
    return TORCH[name](functional.pad(x, (0, short)))[..., : x.shape[-1]] if short else TORCH[name](x)


def gated(gate: Tensor, up: Tensor, name: str, recipes: Recipes | None = None) -> Tensor:
    """The activation of every element of `gate` times that of `up`; differentiable, and cheap to compute again."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        y = _Gated.apply(gate, up, name)
        return cheap(y, lambda: gate_values(gate, up, name), recipes)
    return gate_values(gate, up, name)


def gate_values(gate: Tensor, up: Tensor, name: str) -> Tensor:
    """What `gated` gives, computed."""
    return elementwise.gate(gate, up, name) if is_native(gate, name) else _activate(gate, name) * up


class _Gated(torch.autograd.Function):
    """Keeps what went in, not the activation."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, name: str) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(gate, up)
        ctx.name = name
        return gate_values(gate, up, name)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def,override]
        gate, up = ctx.saved_tensors
        grads = elementwise.gate_grad if is_native(gate, ctx.name) else torch_gate_grad
        return *grads(gate, up, grad, ctx.name), None


def torch_gate_grad(gate: Tensor, up: Tensor, grad: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What comes back to the gate and to what it scales."""
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        opened = _activate(leaf, name)
    (dgate,) = torch.autograd.grad(opened, leaf, grad * up)
    return dgate, grad * opened.detach()


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, name: str) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x)
        ctx.name = name
        return elementwise.activate(x, name)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def,override]
        return elementwise.activate_grad(ctx.saved_tensors[0], grad.contiguous(), ctx.name), None
