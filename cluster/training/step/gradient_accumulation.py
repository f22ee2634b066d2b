"""Gradients on their way into the optimiser: each is added into its float32 sum as soon as it is complete.

Products of the native kernels write there themselves; what autograd makes comes by a hook, and is freed at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cluster.training.step.flat_buffers import FlatBuffers
from parallel.matmul.grad_sum import ATTRIBUTE
from parallel.matmul.products import outer_product, uses_native


class GradientSum:
    """The part of a flat buffer into which one parameter's gradients are added."""

    def __init__(self, flat: FlatBuffers, name: str) -> None:
        self._total, self._waiting, self._name = flat.view(flat.grad, name), flat.waiting, name

    def add_product(self, grad_TN: Tensor, x_TK: Tensor) -> bool:
        if not uses_native(grad_TN):
            return False
        if self._name in self._waiting:
            self._total.add_(outer_product(grad_TN, x_TK, torch.empty_like(self._total)))
        else:
            outer_product(grad_TN, x_TK, self._total)
            self._waiting.add(self._name)
        return True

    def add(self, parameter: Tensor) -> None:
        """The hook of what autograd made."""
        if parameter.grad is None:
            return
        if self._name in self._waiting:
            self._total.add_(parameter.grad)
        else:
            self._total.copy_(parameter.grad)
            self._waiting.add(self._name)
        parameter.grad = None


def accumulating(flat: FlatBuffers) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Has each gradient added into its float32 sum as soon as it is complete."""
    for name, parameter in flat.parameters.items():
        total = GradientSum(flat, name)
        setattr(parameter, ATTRIBUTE, total)
        yield parameter.register_post_accumulate_grad_hook(total.add)
