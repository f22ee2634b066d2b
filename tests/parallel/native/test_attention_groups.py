"""Query heads whose group a rank holds only a part of: the kernel gives them the bits of whole groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.attention.attend import AttentionMetadata
from parallel.errors import ConfigError
from parallel.native import attention as native
from tests.parallel.native.test_attention import Heads, one_thread, same_bits

__all__ = ["one_thread"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "skip", "N"), [(4, 3, 3), (4, 1, 8), (3, 2, 2), (7, 0, 9), (2, 1, 4)])
def test_heads_whose_groups_are_cut_get_the_bits_of_whole_groups(
    size: int, skip: int, N: int, dtype: torch.dtype
) -> None:
    """What a rank in the middle computes, against all heads of the groups that it has a part of."""
    K, H, lengths = -(-(N + skip) // size), 24, (70, 1, 33)
    heads = Heads(K * size, K, H, False, dtype)
    q, k, v = heads.qkv(sum(lengths))
    own = slice(skip, skip + N)
    packing = AttentionMetadata.packed(lengths)
    step_ = packing.paged_step
    blocks = step_.num_blocks

    def forward(q: Tensor, grouping: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        caches = (torch.full((blocks, K, 16 * H), float("nan"), dtype=dtype) for _ in range(2))
        lse = torch.empty(q.shape[:2])
        return native.forward(step_, *caches, q, k, v, scale=0.3, lse_TN=lse, grouping=grouping), lse  # type: ignore

    def backward(q: Tensor, o: Tensor, lse: Tensor, grad: Tensor, grouping: Any, per_head: bool) -> tuple[Tensor, ...]:
        return native.backward(
            packing.starts.query_starts_S1,
            q,
            k,
            v,
            o,
            lse,
            grad,
            scale=0.3,
            kv_grad_per_head=per_head,
            grouping=grouping,
        )

    whole, part = forward(q, None), forward(q[:, own], (size, skip))
    for a, b in zip(whole, part, strict=True):
        assert same_bits(a[:, own], b)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    all_heads = backward(q, *whole, grad, None, True)
    own_heads = backward(q[:, own], *part, grad[:, own], (size, skip), True)
    for a, b in zip(all_heads, own_heads, strict=True):
        assert same_bits(a[:, own], b)
    summed = backward(q[:, own], *part, grad[:, own], (size, skip), False)
    kv_of = [(head + skip) // size for head in range(N)]
    for per_head, total in zip(own_heads[1:], summed[1:], strict=True):
        wanted = torch.zeros(total.shape).index_add(1, torch.tensor(kv_of), per_head.float())
        torch.testing.assert_close(total.float(), wanted, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=2e-2)


def test_a_decoded_token_of_a_cut_group_gets_the_bits_of_the_training_forward() -> None:
    size, skip, N, K, H = 4, 3, 6, 3, 16
    q, k, v = Heads(N, K, H, False, torch.float32).qkv(40)
    o, _ = packed_with(q, k, v, (size, skip))
    cache = Heads(N, K, H, False, torch.float32).cache(4)
    for start, count in ((0, 37), (37, 1), (38, 1), (39, 1)):
        meta = AttentionMetadata.build([count], [start + count], [[2, 0, 3]], 16)
        rows = slice(start, start + count)
        got = native.attend(
            meta.paged_step, cache.paged(0), q[rows], k[rows], v[rows], scale=0.3, grouping=(size, skip)
        )
        assert same_bits(got, o[rows])
    with pytest.raises(ConfigError, match=r"K = ceil\(\(N \+ 3\) / 4\)"):
        packed_with(q, k[:, :2], v[:, :2], (size, skip))


def packed_with(q: Tensor, k: Tensor, v: Tensor, grouping: tuple[int, int]) -> tuple[Tensor, Tensor]:
    step_ = AttentionMetadata.packed([len(q)]).paged_step
    blocks = step_.num_blocks
    caches = (torch.zeros((blocks, x.shape[1], 16 * x.shape[2])) for x in (k, v))
    lse = torch.empty(q.shape[:2])
    return native.forward(step_, *caches, q, k, v, scale=0.3, lse_TN=lse, grouping=grouping), lse  # type: ignore
