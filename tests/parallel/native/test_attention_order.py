"""bfloat16 attention takes its scores in the order `amx32`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.native import attention
from parallel.native.compiled import library
from tests.parallel.native.attention_digest import drawn, paged

pytestmark = pytest.mark.skipif(not library.available(), reason="the native kernels cannot be built here")


def flushed(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 2.0**-126, 0.0, x)


def chain(q: Tensor, k: Tensor) -> Tensor:
    """fma over the last axis; float64 holds each product exactly, and its sums round to float32 as fma does."""
    total = torch.zeros(q.shape[:-1])
    for i in range(q.shape[-1]):
        total = flushed((q[..., i].double() * k[..., i].double() + total.double()).float())
    return total


def in_order(q: Tensor, k: Tensor) -> Tensor:
    """q . k over the last axis in blocks of 32, even elements and odd ones apart."""
    total = torch.zeros(q.shape[:-1])
    for a, b in zip(flushed(q.float()).split(32, -1), flushed(k.float()).split(32, -1), strict=True):
        total = flushed(total + flushed(chain(a[..., ::2], b[..., ::2]) + chain(a[..., 1::2], b[..., 1::2])))
    return total


@pytest.mark.parametrize("head_dim", [16, 17, 31, 33, 64, 80, 96, 127, 128, 256])
@pytest.mark.parametrize("tiny", [False, True])
def test_a_score_is_summed_in_blocks_of_32_even_and_odd_dimensions_apart(head_dim: int, tiny: bool) -> None:
    """The log-sum-exp of one key is its score."""
    T, N, block_size = 20, 3, 16
    step, blocks = paged((1,) * T, block_size)
    caches = torch.zeros(2, blocks, N, 1, block_size * head_dim).bfloat16()
    q, k = (drawn(T, N, head_dim, seed, tiny) for seed in (1, 2))
    scores = torch.empty(T, N)
    attention.forward(step, caches[0], caches[1], q, k, k, scale=1.0, lse_TN=scores)
    assert torch.equal(scores, in_order(q, k))
    assert (torch.tensor(2.0**-126) / 4).item() == 2.0**-128, "the thread itself flushes nothing"
