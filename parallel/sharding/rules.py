"""Sharding rules as values: how a full tensor is divided among ranks, and put together again.

`Replicated()`, `Split(dim, shards)` and `Fused(dim, parts)` each answer which pieces of the full tensor a rank
owns; loading, saving, resharding and the tests use the same value. Shards may be uneven, and empty where ranks
outnumber units. No rule copies anything itself: `pieces` are index ranges, so a rank can read just those from a
file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from parallel.errors import ConfigError
from parallel.sharding.parameter import Weight
from parallel.sharding.tree import Range, ReductionTree, even_runs

Index = tuple[slice, ...]
WIDE = 64
"""Wide axes are cut at multiples of this many columns, the width of a kernel's panel."""


@dataclass(frozen=True)
class VirtualShards:
    """An axis cut into leaves at `borders` (len = leaves + 1), owned by `num_ranks` ranks in runs of leaves."""

    borders: tuple[int, ...]
    num_ranks: int

    @staticmethod
    def even(num_units: int, num_leaves: int, num_ranks: int) -> VirtualShards:
        """Leaves of as equal a number of units as possible, the longer ones first; wide axes are cut at multiples of
        64.
        """
        grain = (
            WIDE if num_units >= WIDE * num_leaves else 2 if num_units >= 2 * num_leaves and num_units % 2 == 0 else 1
        )
        grains = -(-num_units // grain)
        borders = [min(stop * grain, num_units) for _, stop in even_runs(grains, num_leaves)]
        return VirtualShards((0, *borders), num_ranks)

    def scaled(self, unit: int) -> VirtualShards:
        """The same leaves when every unit is `unit` elements wide (a head of head_dim columns)."""
        return VirtualShards(tuple(border * unit for border in self.borders), self.num_ranks)

    @property
    def size(self) -> int:
        return self.borders[-1]

    @property
    def num_leaves(self) -> int:
        return len(self.borders) - 1

    @cached_property
    def tree(self) -> ReductionTree:
        return ReductionTree.over(self.num_leaves, self.num_ranks)

    def range(self, rank: int) -> Range:
        """The elements [start, stop) that the rank owns."""
        first, last = self.tree.owners[rank]
        return self.borders[first], self.borders[last]

    def local_size(self, rank: int) -> int:
        start, stop = self.range(rank)
        return stop - start

    def local_borders(self, rank: int) -> tuple[int, ...]:
        """The leaf borders inside the rank's own slice, counted from its start."""
        first, last = self.tree.owners[rank]
        return tuple(border - self.borders[first] for border in self.borders[first : last + 1])

    def local_nodes(self, rank: int) -> tuple[Range, ...]:
        """The rank's complete subtrees as ranges of its own leaves."""
        first = self.tree.owners[rank][0]
        return tuple((lo - first, hi - first) for lo, hi in self.tree.nodes(rank))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements owned by each rank."""
        return tuple(self.local_size(rank) for rank in range(self.num_ranks))


class _Taking:
    """How one tensor is divided: `pieces` of the full tensor per rank, concatenated along `dim`."""

    dim: int

    def pieces(self, full_shape: Sequence[int], rank: int) -> list[Index]:
        raise NotImplementedError(f"{type(self).__name__} must say which pieces a rank owns")

    def take(self, full: Tensor, rank: int) -> Tensor:
        """The rank's shard of the full tensor, contiguous."""
        parts = [full[index] for index in self.pieces(full.shape, rank)]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, self.dim)

    def local_shape(self, full_shape: Sequence[int], rank: int) -> tuple[int, ...]:
        shape = list(full_shape)
        shape[self.dim] = sum(index[self.dim].stop - index[self.dim].start for index in self.pieces(full_shape, rank))
        return tuple(shape)


def _along(dim: int, full_shape: Sequence[int], start: int, stop: int) -> Index:
    return tuple(slice(start, stop) if d == dim else slice(0, size) for d, size in enumerate(full_shape))


@dataclass(frozen=True)
class Replicated(_Taking):
    """Every rank holds the whole tensor."""

    dim: int = 0

    def pieces(self, full_shape: Sequence[int], rank: int) -> list[Index]:
        return [tuple(slice(0, size) for size in full_shape)]

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        return shards[0]


@dataclass(frozen=True)
class Split(_Taking):
    """Rank r holds its run of the axis `dim`."""

    dim: int
    shards: VirtualShards

    def pieces(self, full_shape: Sequence[int], rank: int) -> list[Index]:
        if full_shape[self.dim] != self.shards.size:
            raise ConfigError(f"axis {self.dim} of shape {tuple(full_shape)} should have {self.shards.size} elements")
        return [_along(self.dim, full_shape, *self.shards.range(rank))]

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(shards), self.dim)


@dataclass(frozen=True)
class Part:
    """One block of a fused axis: `size` rows, split by `shards`, or replicated where there are none. `held` says what
    each rank holds where that is more than its shard (a key/value head whose query heads lie on several ranks): the
    shard is then what it answers for in sums, norms and files.
    """

    size: int
    shards: VirtualShards | None = None
    held: tuple[Range, ...] | None = None

    def range(self, rank: int) -> Range:
        """What the rank holds."""
        if self.held is not None:
            return self.held[rank]
        return self.shards.range(rank) if self.shards else (0, self.size)

    def local_size(self, rank: int) -> int:
        start, stop = self.range(rank)
        return stop - start

    def own(self, rank: int) -> Range:
        """What the rank answers for, counted from the start of what it holds; of a replicated block rank 0 does."""
        if self.shards is None:
            return (0, self.size if rank == 0 else 0)
        (start, stop), first = self.shards.range(rank), self.range(rank)[0]
        return start - first, stop - first


@dataclass(frozen=True)
class Fused(_Taking):
    """Blocks laid one after another along `dim` (q, k and v), each divided by its own rule."""

    dim: int
    parts: tuple[Part, ...]

    def pieces(self, full_shape: Sequence[int], rank: int) -> list[Index]:
        total = sum(part.size for part in self.parts)
        if full_shape[self.dim] != total:
            raise ConfigError(
                f"axis {self.dim} of shape {tuple(full_shape)} should have {total} elements in {len(self.parts)} blocks"
            )
        pieces, offset = [], 0
        for part in self.parts:
            start, stop = part.range(rank)
            pieces.append(_along(self.dim, full_shape, offset + start, offset + stop))
            offset += part.size
        return pieces

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        blocks: list[Tensor] = []
        offsets = [0] * len(shards)
        for part in self.parts:
            for rank, shard in enumerate(shards):
                start, stop = part.own(rank)
                blocks.append(shard.narrow(self.dim, offsets[rank] + start, stop - start))
                offsets[rank] += part.local_size(rank)
        return torch.cat(blocks, self.dim)


def sharded(
    full_shape: Sequence[int],
    rule: Replicated | Split | Fused,
    rank: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    counted: bool | None = None,
) -> nn.Parameter:
    """An uninitialised parameter of the rank's shape that remembers its rule and its full shape. `counted`: whether
    something is derived from it that follows its writes (parallel.sharding.parameter); of matrices, unless said.
    """
    made = Weight if counted or (counted is None and len(full_shape) == 2) else nn.Parameter  # whose reads are quicker
    with torch.inference_mode(False):  # writes to memory made in that mode are not counted
        parameter = made(torch.empty(rule.local_shape(full_shape, rank), dtype=dtype, device=device))
    parameter.shard_rule = rule  # type: ignore[attr-defined]
    parameter.full_shape = tuple(full_shape)  # type: ignore[attr-defined]
    return parameter


def rule_of(parameter: Tensor) -> Replicated | Split | Fused:
    """The sharding rule stated where the parameter was made; replicated unless stated otherwise."""
    return getattr(parameter, "shard_rule", Replicated())


def full_shape_of(parameter: Tensor) -> tuple[int, ...]:
    return getattr(parameter, "full_shape", tuple(parameter.shape))
