"""A weight's gradient, straight into the float32 sum that its optimiser keeps, where the kernels can do that.

    backward of a linear layer --weight_grad--> the parameter's GradSum, or autograd's own way

Spares a tensor as large as the weight and its rounding to the weight's type (Megatron-LM's gradient accumulation
fusion). Whether there is a sum, and what was added to it, is its owner's; a parameter without one is not affected.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from parallel.matmul.products import outer_product

ATTRIBUTE = "grad_sum"
"""Of a parameter: its GradSum, if an optimiser keeps one."""


class GradSum(Protocol):
    """Where one parameter's gradients are added up."""

    def add_product(self, grad_TN: Tensor, x_TK: Tensor) -> bool:
        """Adds grad^T x; False where it cannot and wants the gradient from autograd."""


def weight_grad(weight: Tensor, grad_TN: Tensor, x_TK: Tensor) -> Tensor | None:
    """grad^T x, [N, K], for autograd to pass on; None where it has been added to the weight's sum already."""
    total: GradSum | None = getattr(weight, ATTRIBUTE, None)
    if total is not None and total.add_product(grad_TN, x_TK):
        return None
    return outer_product(grad_TN, x_TK)
