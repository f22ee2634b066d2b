"""A process group as a value: who this rank is among how many, and how they talk.

`Group(rank=1, size=4)` without a communicator builds any rank's shard in a unit test or on meta tensors;
`Group.single()` makes every collective a no-op. Nothing below ever asks a global for its rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from parallel.errors import CollectiveError, ConfigError
from parallel.sharding.rules import VirtualShards

if TYPE_CHECKING:
    from parallel.ranks.comm import Comm

Numerics = Literal["invariant", "fast"]
NUM_LEAVES = 8
"""Virtual shards of a sharded axis unless there are fewer heads or more ranks: the largest tp size that shares one
set of bits.
"""


@dataclass(frozen=True, eq=False)
class Group:
    """One rank's view of a group of ranks. `numerics` fixes how sums over sharded axes are ordered (see
    parallel.sharding.tree).
    """

    rank: int = 0
    size: int = 1
    comm: Comm | None = None
    numerics: Numerics = "invariant"
    sequence_parallel: bool = (
        False  # divide activations between sharded layers by tokens while training (parallel.ranks.sequence_parallel)
    )

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"rank {self.rank} is outside a group of {self.size}; ranks run from 0 to size - 1")
        if self.numerics not in ("invariant", "fast"):
            raise ConfigError(f"numerics {self.numerics!r} is unknown; choose 'invariant' or 'fast'")

    @staticmethod
    def single(numerics: Numerics = "invariant") -> Group:
        return Group(numerics=numerics)

    def reconnect(self, comm: Comm | None) -> None:
        """The same place among new peers, after the old ones were lost: whatever was built with this group, a whole
        model say, talks over the new communicator from now on. The one thing about a group that may change.
        """
        object.__setattr__(self, "comm", comm)

    @property
    def talk(self) -> Comm:
        """The communicator; an error where the group was built for shapes only."""
        if self.comm is None:
            raise CollectiveError(
                f"rank {self.rank} of {self.size} has no communicator: this group can build shards but not run a "
                "forward; make it with parallel.ranks.mesh.init_groups"
            )
        return self.comm

    def num_leaves(self, num_units: int) -> int:
        """Into how many virtual shards an axis of `num_units` indivisible units (heads, columns, vocabulary rows) is
        cut.
        """
        wanted = self.size if self.numerics == "fast" else max(NUM_LEAVES, self.size)
        return max(1, min(wanted, num_units))

    def shards(self, num_units: int, num_leaves: int | None = None) -> VirtualShards:
        """Virtual shards of an axis of `num_units`; `scaled` where each is several elements."""
        return VirtualShards.even(num_units, num_leaves or self.num_leaves(num_units), self.size)
