"""What is lost where numbers are stored in a narrower type: those that become infinite, and those that become 0."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a finite number of one type may be infinite or 0 in another."""
    a, b = torch.finfo(source), torch.finfo(target)
    return b.max < a.max or b.smallest_normal > a.smallest_normal


@dataclass
class Lost:
    """Counted by tensor."""

    overflowed: dict[str, int] = field(default_factory=dict)
    flushed: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, before: Tensor, after: Tensor) -> None:
        """Compares a tensor, or a piece of one, with itself in the other type."""
        if not narrows(before.dtype, after.dtype):
            return
        infinite = int(after.isinf().count_nonzero()) - int(before.isinf().count_nonzero())
        zero = int(before.count_nonzero()) - int(after.count_nonzero())
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
