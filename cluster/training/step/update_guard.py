"""Whether an update would give numbers that are not finite, found out before anything is written.

    bounds of masters and moments --rates, gradient norm--> bounds of what the update would make of them
        proven finite (the usual case): nothing is read, nothing is exchanged
        not proven (no epsilon, a huge rate, float16): a trial on copies, in pieces, by the update's own kernel

A weight that is no finite number to begin with (a checkpoint's row that nobody reads, say) stays as it is, and is no
reason to refuse. Bounds are the whole group's, so every rank takes the same way. Two collectives per trial or
measurement: a maximum over tensor-parallel and one over data-parallel ranks, none in groups of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.training.step.flat_buffers import FlatBuffers
from cluster.training.step.nonfinite_errors import BrokenUpdate
from parallel.native.adamw import Rates
from parallel.ranks.group import Group

LARGE = 1e37
"""Numbers up to this one, and their rounding, are far from float32's end."""
SMALL = 1e-37
"""A divisor from this one on is no subnormal that a kernel may take for zero."""
ROUNDING = 1.0 + 1e-6
"""More than the rounding of one update adds to a number."""
PIECE = 1 << 20
"""Elements of a trial: bounds the copies."""
TRIAL_BYTES = 28
"""For each element of a piece: copies of master, gradient and both moments, a scaled gradient, what a check makes."""
KINDS = ("weight", "first moment", "second moment")
Apply = Callable[[Tensor, Tensor, Tensor, Tensor, Rates], None]
"""One update in place: master, gradient, both moments."""


@dataclass(frozen=True)
class Bounds:
    """No finite element of a flat buffer's masters and moments is larger than these, on any rank."""

    master: float
    first: float
    second: float

    def after(self, rates: Rates, gradient: float) -> Bounds:
        """Of the same after an update with gradients of at most `gradient` before they are scaled.

        |m'| <= max(|m|, |g|) and v' <= max(v, g^2), as both are weighted means; |p'| <= |p| max(1, lr wd) +
        step size |m'| / epsilon, as the root in the denominator is not negative. Not finite where that proves nothing.
        """
        scaled = gradient * rates.scale * ROUNDING
        first = max(self.first, scaled) * ROUNDING
        second = max(self.second, scaled * scaled) * ROUNDING
        step_size = rates.learning_rate / (1.0 - rates.beta1**rates.step)
        root = math.sqrt(1.0 - rates.beta2**rates.step)
        decay = rates.learning_rate * rates.weight_decay
        moved = step_size * first / rates.epsilon if rates.epsilon >= SMALL else math.inf
        master = (self.master * max(1.0, decay) + moved) * ROUNDING
        sizes = [gradient, first, second, rates.epsilon, rates.learning_rate, rates.weight_decay, decay, step_size]
        sizes += [step_size * first, math.sqrt(second) / root, master]
        proven = all(size <= LARGE for size in sizes)
        return Bounds(master, first, second) if proven else Bounds(math.inf, math.inf, math.inf)


class UpdateGuard:
    """One optimiser's. All ranks of the groups call `check` together."""

    def __init__(self, tp: Group, dp: Group, device: torch.device) -> None:
        self._groups, self._device = (tp, dp), device
        self._bounds: list[Bounds] | None = None

    def forget(self) -> None:
        """The masters or moments were written from outside."""
        self._bounds = None

    def check(
        self,
        flats: Sequence[FlatBuffers],
        moments: Mapping[FlatBuffers, Mapping[str, Tensor]],
        rates: Sequence[Rates],
        norm: float,
        apply: Apply,
    ) -> None:
        """Raises BrokenUpdate, on every rank alike, where the update would not be finite."""
        if self._bounds is None:
            self._bounds = self._measured(flats, moments)
        gradient = norm * ROUNDING + 1e-18  # squares below float32's range are lost in a norm
        after = [own.after(rate, gradient) for own, rate in zip(self._bounds, rates, strict=True)]
        if not all(own.master <= flat.limit for own, flat in zip(after, flats, strict=True)):
            after = self._tried(flats, moments, rates, apply)
        self._bounds = after

    def _measured(
        self, flats: Sequence[FlatBuffers], moments: Mapping[FlatBuffers, Mapping[str, Tensor]]
    ) -> list[Bounds]:
        """As they are now."""
        found = []
        for flat in flats:
            for values in (flat.own_master, *moments[flat].values()):
                found.append(max(map(_size, values.split(PIECE)), default=0.0))
        return _bounds(self._largest(found))

    def _tried(
        self,
        flats: Sequence[FlatBuffers],
        moments: Mapping[FlatBuffers, Mapping[str, Tensor]],
        rates: Sequence[Rates],
        apply: Apply,
    ) -> list[Bounds]:
        """The update on copies."""
        found, broken, number = [], 0.0, 0
        for flat, rate in zip(flats, rates, strict=True):
            largest = [0.0, 0.0, 0.0]
            for name in flat.parameters:
                for kind, size in enumerate(_trial(flat, moments[flat], name, rate, apply)):
                    if not math.isfinite(size):
                        broken = max(broken, float(1 + number * len(KINDS) + kind))
                    largest[kind] = max(largest[kind], size)
                number += 1
            found += largest
        broken, *found = self._largest([broken, *found])
        if broken:
            number, kind = divmod(int(broken) - 1, len(KINDS))
            name = [name for flat in flats for name in flat.parameters][number]
            raise BrokenUpdate(f"the update would leave the {KINDS[kind]} of {name} not finite ({_words(rates)})")
        return _bounds(found)

    def _largest(self, values: list[float]) -> list[float]:
        """Of all ranks."""
        for group in self._groups:
            if group.size > 1:
                mine = torch.tensor(values, dtype=torch.float64, device=self._device)
                values = group.talk.all_reduce_max(mine).tolist()
        return values


def _trial(flat: FlatBuffers, moments: Mapping[str, Tensor], name: str, rates: Rates, apply: Apply) -> Iterator[float]:
    """The largest master, first and second moment of a parameter's part of this rank's slice after the update; inf
    where one ceases to be finite, the master in the parameter's own type.
    """
    start, stop = flat.places[name]
    start, stop = max(start, flat.slice.start), min(stop, flat.slice.stop)
    sizes = [0.0, 0.0, 0.0]
    for low in range(start, stop, PIECE):
        run = slice(low, min(low + PIECE, stop))
        own = slice(run.start - flat.slice.start, run.stop - flat.slice.start)
        master, grad = flat.master[run].clone(), flat.grad[run].clone()
        first, second = (moment[own].clone() for moment in moments.values())
        apply(master, grad, first, second, rates)
        before = flat.master[run], *(moment[own] for moment in moments.values())
        after = master.to(flat.parameters[name].dtype), first, second
        for kind, (old, new) in enumerate(zip(before, after, strict=True)):
            lost = bool((old.isfinite() & ~new.isfinite()).any())
            sizes[kind] = math.inf if lost else max(sizes[kind], _size(new))
    return iter(sizes)


def _size(values: Tensor) -> float:
    """The largest number without its sign, of those that are finite; 0 where there is none."""
    if not len(values):  # a rank may hold no part of a parameter
        return 0.0
    low, high = values.aminmax()
    size = max(-float(low), float(high))
    if math.isfinite(size):
        return size
    whole = values[values.isfinite()]
    return float(whole.abs().max()) if len(whole) else 0.0


def _bounds(values: Sequence[float]) -> list[Bounds]:
    return [Bounds(*values[i : i + 3]) for i in range(0, len(values), 3)]


def _words(rates: Sequence[Rates]) -> str:
    """The numbers that may be at fault."""
    most = max(rates, key=lambda rate: rate.weight_decay)
    names = ("learning_rate", "weight_decay", "epsilon", "beta1", "beta2")
    return ", ".join(f"{name} {getattr(most, name):g}" for name in names)
