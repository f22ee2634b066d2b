"""What products with whole numbers make of drawn ones, as digests."""

from __future__ import annotations

import hashlib

import torch

from parallel.layers.dropout import mix_keys
from parallel.native.gemm import Source, product
from parallel.quantisation.numbers import Numbers
from parallel.quantisation.quantised_weight import QuantisedMatrix

N, K, GROUPS = 130, 301, 5
BORDERS = (0, 100, 101, 301)
ROWS = (1, 3, 6, 17, 40)


def digests() -> dict[str, str]:
    """By kind of numbers and rows of x."""
    x = (_drawn(1, 40 * K) % 4001 - 2000).view(40, K).float().div(700).bfloat16()
    found = {}
    for bits in (4, 8):
        low, count = (0, 16) if bits == 4 else (-128, 256)
        numbers = (_drawn(2, N * K) % count + low).view(N, K).to(torch.int8)
        scales = (_drawn(3, GROUPS * N) % 997 + 1).view(GROUPS, N).float() / 9000
        zeros, groups = (_drawn(4, GROUPS * N) % count + low).view(GROUPS, N), _drawn(5, K) % GROUPS
        kinds = {"groups": Numbers(bits, numbers, scales, zeros.to(torch.int8), groups.int())}
        kinds |= {"columns": Numbers(8, numbers, scales[:1])} if bits == 8 else {}
        for name, made in kinds.items():
            matrix = QuantisedMatrix(made, BORDERS)
            for rows in ROWS:
                got = product([Source(x[:rows], matrix, BORDERS)], out_dtype=torch.float32)
                found[f"{bits} bits by {name}, {rows} rows"] = hashlib.sha256(got.numpy().tobytes()).hexdigest()
    return found


def _drawn(salt: int, count: int) -> torch.Tensor:
    """int64 [count], 0 and more."""
    return mix_keys(torch.arange(count) + (salt << 32)) >> 20 & 0xFFFFFF
