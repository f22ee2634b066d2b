"""A quantised matrix as it is made or read from a file, and what it stands for. N outputs, K inputs, G groups.

    one scale per output     int8, -127..127: exact in bfloat16, so a leaf is summed over the numbers themselves, in the
                             order of bfloat16, then multiplied by the output's float32 scale. Weight: number x scale
    scales per group of K    8 or 4 bits: the weight is bf16(float32(number - zero) x scale), and the product that of
                             the bfloat16 matrix, to the bit. `groups` may be in any order

The first is the more exact, and cheaper: nothing but the sum is rounded. The second is what files of other programs
mean, whose groups end where leaves do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.errors import ConfigError


@dataclass(frozen=True)
class Numbers:
    """A quantised matrix [N, K] as it is made or read, before it is packed. int8 [N, K]: -128..127 of 8 bits, 0..15 of
    4; scales float32 [G, N]; with groups zeros int8 [G, N] and the group of each element of K, int32 [K]: else G is 1.
    """

    bits: int
    numbers: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.numbers.shape
        grouped = self.zeros is not None and self.groups is not None
        if self.bits not in (4, 8) or (self.zeros is None) != (self.groups is None) or not (grouped or self.bits == 8):
            raise ConfigError(f"{self.bits} bits with zeros and groups {grouped}; a scale per column is for 8 bits")
        want: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {
            "numbers": (self.numbers, torch.int8, (n, k)),
            "scales": (self.scales, torch.float32, (len(self.scales), n)),
        }
        if self.zeros is not None and self.groups is not None:
            want |= {
                "zeros": (self.zeros, torch.int8, tuple(self.scales.shape)),
                "groups": (self.groups, torch.int32, (k,)),
            }
        elif len(self.scales) != 1:
            raise ConfigError(f"{len(self.scales)} scales per column; without groups it is one")
        for name, (tensor, dtype, shape) in want.items():
            if tensor.dtype != dtype or tensor.shape != shape:
                raise ConfigError(f"{name} are {list(tensor.shape)} {tensor.dtype}; they must be {list(shape)} {dtype}")

    def values(self) -> Tensor:
        """The weight, bfloat16 [N, K]. Of one scale per column a rounding of it, which products do not make."""
        numbers = self.numbers.float()
        if self.zeros is None or self.groups is None:
            return (numbers * self.scales[0, :, None]).bfloat16()
        groups = self.groups.long()
        return ((numbers - self.zeros[groups].t()) * self.scales[groups].t()).bfloat16()

    def part(self, rows: slice, columns: slice) -> Numbers:
        """Some outputs and inputs of it."""
        zeros = None if self.zeros is None else self.zeros[:, rows]
        groups = None if self.groups is None else self.groups[columns]
        return Numbers(self.bits, self.numbers[rows, columns], self.scales[:, rows], zeros, groups)

    @staticmethod
    def joined(parts: Sequence[Numbers], dim: int) -> Numbers:
        """Those of one matrix put together along its outputs (0) or inputs (1), which share their scales."""
        first = parts[0]
        numbers = torch.cat([part.numbers for part in parts], dim)
        if dim == 1:
            groups = None if first.groups is None else torch.cat([p.groups for p in parts if p.groups is not None])
            return Numbers(first.bits, numbers, first.scales, first.zeros, groups)
        zeros = None if first.zeros is None else torch.cat([p.zeros for p in parts if p.zeros is not None], 1)
        return Numbers(first.bits, numbers, torch.cat([p.scales for p in parts], 1), zeros, first.groups)
