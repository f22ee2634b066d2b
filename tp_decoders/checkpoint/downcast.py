"""What is lost where numbers are stored in a narrower type: those that become infinite, and those that become 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

COPIED = 1 << 16
"""Numbers at once."""


def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a finite number of one type may be infinite or 0 in another."""
    a, b = torch.finfo(source), torch.finfo(target)
    return b.max < a.max or b.smallest_normal > a.smallest_normal


def _rows(values: Tensor) -> Iterator[Tensor]:
    """A few rows at a time: what looks at numbers may copy them."""
    rows = values.reshape(1) if values.dim() == 0 else values
    step = max(1, COPIED * len(rows) // max(1, rows.numel()))
    return iter(rows.split(step)) if rows.numel() else iter(())


def _within(values: Tensor, target: torch.dtype) -> bool:
    """Whether all are numbers that the other type has."""
    for part in _rows(values):
        low, high = torch.aminmax(part)
        if not (low >= torch.finfo(target).min and high <= torch.finfo(target).max):  # nor of NaN
            return False
    return True


def _infinite(values: Tensor) -> int:
    return sum(int(part.isinf().count_nonzero()) for part in _rows(values))


def _nonzero(values: Tensor) -> int:
    return sum(int(part.count_nonzero()) for part in _rows(values))


@dataclass
class Lost:
    """Counted by tensor."""

    overflowed: dict[str, int] = field(default_factory=dict)
    flushed: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, before: Tensor, after: Tensor) -> None:
        """Compares a tensor, or a piece of one, with itself in the other type."""
        if not narrows(before.dtype, after.dtype):
            return
        infinite = 0 if _within(before, after.dtype) else _infinite(after) - _infinite(before)
        zero = _nonzero(before) - _nonzero(after)
        for table, number in ((self.overflowed, infinite), (self.flushed, zero)):
            if number:
                table[name] = table.get(name, 0) + number

    def overflow(self) -> str:
        """Which tensors' values became infinite, the worst first."""
        worst = sorted(self.overflowed.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{number} of {name}" for name, number in worst[:8])
        return shown + (f" and of {len(worst) - 8} more tensors" if len(worst) > 8 else "")

    def report(self) -> list[str]:
        """Lines, none where nothing was lost."""
        lines = []
        if self.overflowed:
            lines.append(f"{sum(self.overflowed.values())} values became infinite: {self.overflow()}")
        if self.flushed:
            lines.append(f"{sum(self.flushed.values())} values too small for the type became 0")
        return lines
