"""A communicator without peers, for tensors that are shapes only: each collective is counted and gives the right shape.

It makes the temporaries that the real transport makes: `shared memory` none but the result, `torch` (gloo, nccl) the
gathered roots of all ranks. Any rank of any size can so be run alone. What a rank gives to a collective is counted
as `counts` and `byte_counts`, as every communicator does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from parallel.ranks.comm import Traffic, check_nodes, check_sizes, finish
from parallel.sharding.tree import ReductionTree

Transport = Literal["shm", "torch"]


class FakeComm(Traffic):
    """One rank's handle on a group that does not exist."""

    def __init__(self, rank: int, size: int, transport: Transport = "torch") -> None:
        super().__init__(rank, size)
        self._gathers = transport == "torch"

    def tree_sum(
        self, nodes: Tensor, tree: ReductionTree, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        check_nodes(nodes, tree, self.rank)
        self.issue("tree_sum", nodes.nbytes)
        shape = nodes.shape[1:]
        if not self._gathers:
            return nodes.new_empty(shape, dtype=dtype or torch.float32)
        gathered = nodes.new_empty((self.size, max(tree.node_counts), *shape))
        roots = [gathered[rank, i] for rank, count in enumerate(tree.node_counts) for i in range(count)]
        return finish(roots, tree, bias, dtype)

    def slot(self, nbytes: int) -> int | None:
        return None

    def tree_sum_in_place(
        self, shape: Sequence[int], tree: ReductionTree, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        raise AssertionError("there is no slot to have written to")

    def sum(self, x: Tensor) -> Tensor:
        self.issue("sum", x.nbytes)
        if not self._gathers:
            return torch.empty_like(x)
        wide = x.dtype in (torch.bfloat16, torch.float16)
        return (x.float() if wide else x.clone()).to(x.dtype)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        self.issue("all_reduce_max", x.nbytes)
        return x.new_empty((self.size, *x.shape)).amax(0) if self._gathers else torch.empty_like(x)

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        check_sizes(x, sizes, dim, self.rank, self.size)
        self.issue("all_gather", x.nbytes)
        return self._joined(x, sizes, dim)

    def gather(self, x: Tensor, sizes: Sequence[int], dim: int, dst: int = 0) -> Tensor | None:
        check_sizes(x, sizes, dim, self.rank, self.size)
        self.issue("gather", x.nbytes)
        return self._joined(x, sizes, dim) if self.rank == dst else None

    def broadcast_bytes(self, payload: bytes | None, timeout: float | None = None) -> bytes:
        self.issue("broadcast_bytes", len(payload or b""))
        return payload or b""

    def barrier(self, timeout: float | None = None) -> None:
        self.issue("barrier", 0)

    def close(self) -> None:
        self.broken = self.broken or "closed"

    def _joined(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        def of(length: int) -> list[int]:
            return [length if axis == dim % x.dim() else size for axis, size in enumerate(x.shape)]

        if not self._gathers:
            return x.new_empty(of(sum(sizes)))
        gathered = x.new_empty((self.size, *of(max(sizes))))
        return torch.cat([gathered[rank].narrow(dim, 0, length) for rank, length in enumerate(sizes)], dim)
