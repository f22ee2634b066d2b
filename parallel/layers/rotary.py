"""Rotation of the first part of every head by its token's angles (rotary position embedding): in float32, rounded once.

Where the angles come from is the model's matter. No collectives. T tokens, N heads, H head, R rotated elements (R <= H,
in two halves).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from parallel.matmul.products import uses_native
from parallel.native import elementwise


@dataclass(frozen=True, eq=False)
class Rotation:
    """What one forward needs: cos and sin of every token's angles, [T, R/2] float32 each."""

    cos: Tensor
    sin: Tensor

    @cached_property
    def _spread(self) -> dict[int, Rotation]:
        return {}

    def by_head(self, n_heads: int) -> Rotation:
        """The same with a row per token and head, [T * N, R/2]; made once per forward."""
        if n_heads not in self._spread:
            cos, sin = (table.repeat_interleave(n_heads, 0) for table in (self.cos, self.sin))
            self._spread[n_heads] = Rotation(cos, sin)
        return self._spread[n_heads]


def rotated(qkv_TN3H: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
    """q and k rotated, and v: [T, N, H] each. Without gradients q and k turn in place, in one call."""
    assert rotation is not None, "a pass through a model with rotary positions has one"
    if torch.is_grad_enabled() and qkv_TN3H.requires_grad:
        q_TNH, k_TNH, v_TNH = qkv_TN3H.unbind(2)
        return rotate(q_TNH, rotation), rotate(k_TNH, rotation), v_TNH
    q_TNH, k_TNH, v_TNH = qkv_TN3H.unbind(2)
    n_heads = qkv_TN3H.shape[1]
    if qkv_TN3H.stride(0) == n_heads * qkv_TN3H.stride(1):  # tokens and heads are one axis of this memory
        rotate_(qkv_TN3H.flatten(0, 1)[:, :2], rotation.by_head(n_heads))
        return q_TNH, k_TNH, v_TNH
    return rotate_(q_TNH, rotation), rotate_(k_TNH, rotation), v_TNH  # flattened, it would be a copy that turns


def rotate(x_TNH: Tensor, rotation: Rotation | None) -> Tensor:
    """The rotated heads: in place where no gradient is wanted, a new tensor otherwise; the same bits both ways."""
    assert rotation is not None, "a pass through a model with rotary positions has one"
    if torch.is_grad_enabled() and x_TNH.requires_grad:
        return _Rotate.apply(x_TNH, rotation)
    return rotate_(x_TNH, rotation)


def rotate_(x_TNH: Tensor, rotation: Rotation, inverse: bool = False) -> Tensor:
    """Rotates in place (back, if inverse), in float32, rounded once. The tensor may be a strided view."""
    if uses_native(x_TNH):
        return elementwise.rotary_(x_TNH, rotation.cos, rotation.sin, inverse)
    half = rotation.cos.shape[-1]
    first, second = x_TNH[..., :half].float(), x_TNH[..., half : 2 * half].float()
    cos, sin = rotation.cos[:, None], (-rotation.sin if inverse else rotation.sin)[:, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    x_TNH[..., : 2 * half].copy_(turned)
    return x_TNH


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx, x_TNH: Tensor, rotation: Rotation) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.rotation = rotation
        return rotate_(x_TNH.clone(memory_format=torch.contiguous_format), rotation)

    @staticmethod
    def backward(ctx, grad_TNH: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def,override]
        return rotate_(grad_TNH.clone(memory_format=torch.contiguous_format), ctx.rotation, inverse=True), None
