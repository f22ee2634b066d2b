"""The fixed binary tree in which every sum over a sharded axis is taken.

A sharded axis is cut into V leaves. node(lo, hi) = node(lo, mid) + node(mid, hi) with mid = lo + ceil((hi - lo) /
2): the shape of a subtree depends on its width alone. A rank owns a run of leaves, sums the complete subtrees
inside its run, and the collective adds their roots in the same order; so the result does not depend on how many
ranks share the leaves.

    leaves   0   1   2   3   4   5   6   7        3 ranks: runs 0-2, 3-5, 6-7
              \\ /     \\ /     \\ /     \\ /
              0-1     2-3     4-5     6-7         rank 0 sends (0-1) (2), rank 1 (3) (4-5), rank 2 (6-7)
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from parallel.errors import ConfigError

ADD = -1
"""The operation of `ReductionTree.program` that adds the two topmost values."""

Range = tuple[int, int]


def middle(lo: int, hi: int) -> int:
    """Where the node over leaves [lo, hi) is divided."""
    return lo + (hi - lo + 1) // 2


def even_runs(num_leaves: int, num_ranks: int) -> tuple[Range, ...]:
    """Contiguous runs of leaves for each rank, the first ones one leaf longer; empty runs where ranks outnumber
    leaves.
    """
    short, extra = divmod(num_leaves, num_ranks)
    starts = [rank * short + min(rank, extra) for rank in range(num_ranks + 1)]
    return tuple(itertools.pairwise(starts))


@dataclass(frozen=True)
class ReductionTree:
    """A tree over `num_leaves` leaves whose leaves are owned, in runs, by the ranks."""

    num_leaves: int
    owners: tuple[Range, ...]

    def __post_init__(self) -> None:
        ends = [stop for _, stop in self.owners]
        starts = [start for start, _ in self.owners]
        if self.num_leaves < 1 or [*starts, self.num_leaves] != [0, *ends]:
            raise ConfigError(
                f"leaf runs {self.owners} do not cover {self.num_leaves} leaves; give one run per rank, in order, "
                "without gaps"
            )

    @staticmethod
    def over(num_leaves: int, num_ranks: int) -> ReductionTree:
        return ReductionTree(num_leaves, even_runs(num_leaves, num_ranks))

    def nodes(self, rank: int) -> tuple[Range, ...]:
        """The maximal complete subtrees inside the rank's run, left to right."""
        return self._all_nodes[rank]

    @cached_property
    def _all_nodes(self) -> tuple[tuple[Range, ...], ...]:
        return tuple(tuple(self._inside(0, self.num_leaves, run)) for run in self.owners)

    def _inside(self, lo: int, hi: int, run: Range) -> list[Range]:
        if run[0] <= lo and hi <= run[1]:
            return [(lo, hi)]
        if hi <= run[0] or run[1] <= lo or hi - lo == 1:
            return []
        mid = middle(lo, hi)
        return self._inside(lo, mid, run) + self._inside(mid, hi, run)

    @cached_property
    def node_counts(self) -> tuple[int, ...]:
        """How many subtree roots each rank contributes."""
        return tuple(len(nodes) for nodes in self._all_nodes)

    def program(self) -> tuple[int, ...]:
        """Postfix program over the roots of all ranks (numbered rank by rank): push a root, or ADD the two topmost
        values.
        """
        return self._program

    @cached_property
    def _program(self) -> tuple[int, ...]:
        index = {node: i for i, node in enumerate(node for nodes in self._all_nodes for node in nodes)}
        return tuple(_postfix(0, self.num_leaves, index))

    @cached_property
    def fingerprint(self) -> int:
        """Equal on ranks that take the same sum: of the leaves and of which rank owns which."""
        return zlib.crc32(repr((self.num_leaves, self.owners)).encode())

    def finish(self, roots: Sequence[Tensor]) -> Tensor:
        """Adds the roots of all ranks in the tree's order: the reference that every collective must equal bit for
        bit.
        """
        stack: list[Tensor] = []
        for step in self.program():
            if step == ADD:
                right = stack.pop()
                stack.append(stack.pop() + right)
            else:
                stack.append(roots[step])
        return stack.pop()


def leaves_sum(leaves: Sequence[Tensor]) -> Tensor:
    """The node over all the given leaves: the tree in one process."""
    if len(leaves) == 1:
        return leaves[0]
    mid = middle(0, len(leaves))
    return leaves_sum(leaves[:mid]) + leaves_sum(leaves[mid:])


def _postfix(lo: int, hi: int, index: dict[Range, int]) -> list[int]:
    if (lo, hi) in index:
        return [index[lo, hi]]
    mid = middle(lo, hi)
    return [*_postfix(lo, mid, index), *_postfix(mid, hi, index), ADD]
