"""The bits of attention over many shapes, as one digest a part."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from parallel.attention.metadata import starts_of
from parallel.native import attention

SHAPES = [
    # query heads, kv heads, head dim, ALiBi, block size
    (2, 2, 16, False, 16), (2, 1, 17, True, 32), (4, 2, 63, False, 64), (1, 1, 64, True, 32), (2, 1, 80, False, 16),
    (1, 1, 96, True, 64), (1, 1, 128, False, 32),
]  # fmt: skip
LENGTHS = (1, 16, 33, 63, 65, 100)


def drawn(tokens: int, heads: int, head_dim: int, seed: int, tiny: bool) -> Tensor:
    """Ordinary values; where `tiny`, of a size whose products are denormal or vanish."""
    x = torch.randn(tokens, heads, head_dim, generator=torch.Generator().manual_seed(seed))
    return (x * 2.0**-63 if tiny else x).bfloat16()


def paged(lengths: tuple[int, ...], block_size: int) -> tuple[attention.PagedStep, int]:
    """A step of whole sequences in scattered blocks, and how many blocks they take."""
    widths = [-(-length // block_size) for length in lengths]
    tables, taken = torch.zeros(len(lengths), max(widths), dtype=torch.int32), sum(widths)
    free = torch.randperm(taken, generator=torch.Generator().manual_seed(3)).int()
    for row, blocks in zip(tables, free.split(widths), strict=True):
        row[: len(blocks)] = blocks
    context = torch.tensor(lengths, dtype=torch.int32)
    return attention.PagedStep(torch.tensor(starts_of(lengths), dtype=torch.int32), context, tables, block_size), taken


def outputs(shape: tuple[int, int, int, bool, int], tiny: bool) -> dict[str, Tensor]:
    """Output, log-sum-exp and (not `tiny`) gradients of sequences prefilled together."""
    N, K, H, alibi, block_size = shape
    slopes = 2.0 ** -torch.linspace(1, 8, N) if alibi else None
    scale = 2.0**126 if tiny else H**-0.5
    step, blocks = paged(LENGTHS, block_size)
    caches = torch.zeros(2, blocks, K, block_size // attention.RUN, attention.RUN * H).bfloat16()
    T = sum(LENGTHS)
    q, k, v, grad = (drawn(T, heads, H, seed, tiny and seed < 2) for seed, heads in enumerate((N, K, K, N)))
    lse = torch.empty(T, N)
    o = attention.forward(step, caches[0], caches[1], q, k, v, scale=scale, slopes=slopes, lse_TN=lse)
    if tiny:
        return {"o": o, "lse": lse}
    starts = torch.tensor(starts_of(LENGTHS), dtype=torch.int32)
    dq, dk, dv = attention.backward(starts, q, k, v, o, lse, grad, scale=H**-0.5, slopes=slopes)
    return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def digests() -> dict[str, str]:
    found = {}
    for shape in SHAPES:
        for tiny in (False, True):
            for name, x in outputs(shape, tiny).items():
                found[f"{name} {shape} {'tiny' if tiny else ''}"] = hashlib.sha256(
                    x.contiguous().view(torch.uint8).numpy().tobytes()
                ).hexdigest()
    return found
