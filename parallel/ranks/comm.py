"""What a group's ranks can do together: the seam between the layers and the transport.

Two implementations: `parallel.ranks.shared_memory.ShmComm` (ranks of one CPU host) and
`parallel.ranks.process_group.TorchComm` (gloo, nccl). All ranks call the same collectives in the same order, from one
thread. Every wait has a limit; a rank that is missing, dead, late or in another collective is named in a
CollectiveError, after which the comm refuses further work. Nothing here is differentiable: see
parallel.ranks.collectives.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from time import monotonic
from typing import Protocol

import torch
from torch import Tensor

from parallel.errors import CollectiveError
from parallel.ranks.flight_recorder import COLLECTIVE, Flight
from parallel.sharding.tree import ReductionTree

KINDS = ("none", "tree_sum", "sum", "all_reduce_max", "all_gather", "gather", "broadcast_bytes", "barrier")
"""Collectives by the number they carry on the wire."""
COMMANDS = "broadcast_bytes"
"""The kind that carries commands: other ranks than 0 wait in it while there is nothing to do."""


class Comm(Protocol):
    """A rank's handle on its group's collectives. `counts` and `byte_counts`: how many it issued, how much it gave;
    `seconds`: how long it was in those that are over; `flight`: the last of them. All by kind."""

    rank: int
    size: int
    counts: Counter[str]
    byte_counts: Counter[str]
    seconds: defaultdict[str, float]
    flight: Flight
    broken: str | None  # why it refuses work, if it does

    def tree_sum(
        self, nodes: Tensor, tree: ReductionTree, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Finishes the tree over every rank's subtree roots [n_local_nodes, *shape] (float32), adds the bias over the
        last dimension in float32, rounds once to dtype: the same bits on all ranks, and as one process would get."""
        ...

    def slot(self, nbytes: int) -> int | None:
        """The address where this rank may write its nodes for `tree_sum_in_place`, if the transport has such a place;
        good until the next collective."""
        ...

    def tree_sum_in_place(
        self, shape: Sequence[int], tree: ReductionTree, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """`tree_sum` of nodes written, packed, at the address that `slot` gave; peers may use plain `tree_sum`."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """The plain sum in x's type, 16-bit types accumulated in float32; a new tensor."""
        ...

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The largest of all ranks' values, element by element; a new tensor."""
        ...

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """The ranks' tensors side by side along dim; sizes[r] is rank r's length there, and may be 0."""
        ...

    def gather(self, x: Tensor, sizes: Sequence[int], dim: int, dst: int = 0) -> Tensor | None:
        """As all_gather, on rank dst only."""
        ...

    def broadcast_bytes(self, payload: bytes | None, timeout: float | None = None) -> bytes:
        """Rank 0's payload (None elsewhere). Cheap to wait in for a long time."""
        ...

    def barrier(self, timeout: float | None = None) -> None: ...

    def close(self) -> None:
        """Leaves the group; peers that still wait in a collective learn of it. Harmless when repeated."""
        ...


class Traffic:
    """Counts what a comm issues, and refuses work after a failure (the ranks may then be out of step)."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.counts: Counter[str] = Counter()
        self.byte_counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.flight = Flight()
        self.sequence, self.given = 0, 0  # collectives issued; bytes given to the last one
        self._began = 0.0
        self.broken: str | None = None

    def issue(self, kind: str, nbytes: int, plan: int = 0) -> None:
        """To be called once per collective, before anything is sent. `plan` tells sums over differently divided axes
        apart in the flight recorder.
        """
        self.check_whole(kind)
        self.sequence += 1
        self.counts[kind] += 1
        self.byte_counts[kind] += nbytes
        self.given = nbytes
        self._began = self.flight.note(COLLECTIVE, f"{kind} {plan:08x}" if plan else kind, self.sequence, nbytes)

    def check_whole(self, kind: str) -> None:
        """Refuses to start anything after a failure."""
        if self.broken is not None:
            raise CollectiveError(
                f"rank {self.rank} cannot start {kind}: this group stopped earlier ({self.broken}); build a new group"
            )

    def over(self, kind: str) -> None:
        """To be called when the collective has ended well."""
        self.seconds[kind] += monotonic() - self._began


def waited(comm: Comm | None) -> float:
    """Seconds that a rank spent in collectives, waiting for peers included and for commands not."""
    return 0.0 if comm is None else sum(time for kind, time in comm.seconds.items() if kind != COMMANDS)


def check_nodes(nodes: Tensor, tree: ReductionTree, rank: int) -> None:
    """Refuses nodes that are not this rank's roots of the tree."""
    wanted = tree.node_counts[rank]
    if nodes.shape[0] != wanted or nodes.dtype != torch.float32:
        raise CollectiveError(
            f"tree_sum on rank {rank}: given {nodes.shape[0]} nodes of {nodes.dtype}; "
            f"the tree over {tree.num_leaves} leaves has {wanted} float32 nodes on this rank"
        )


def check_sizes(x: Tensor, sizes: Sequence[int], dim: int, rank: int, size: int) -> None:
    """Refuses a gather whose sizes do not describe this rank's tensor."""
    if len(sizes) != size or x.shape[dim] != sizes[rank]:
        raise CollectiveError(
            f"gather on rank {rank} of {size}: its tensor has {x.shape[dim]} along dimension {dim}, "
            f"the sizes given are {list(sizes)}; give one size per rank, the same list on all ranks"
        )


def finish(nodes: Sequence[Tensor], tree: ReductionTree, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """The rest of a tree_sum once all roots are at hand, in stock operators: the reference."""
    total = tree.finish(nodes)
    if bias is not None:
        total = total + bias.float()
    return total.to(dtype or torch.float32)
