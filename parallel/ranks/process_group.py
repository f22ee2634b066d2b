"""Comm over a torch.distributed process group: gloo between CPU hosts or without a compiler, nccl on GPUs.

The same meaning and the same bits as shared memory: `tree_sum` gathers every rank's nodes and finishes the tree
locally. On CPU a small header goes ahead of each collective, so that ranks out of step are named instead of mixing
their data; on GPUs it would cost a synchronisation and is left out. When a collective fails the ranks leave a note in
the rendezvous store: who left none is missing.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.errors import CollectiveError
from parallel.ranks.comm import KINDS, Traffic, check_nodes, check_sizes, finish
from parallel.sharding.tree import ReductionTree

ROLL_CALL_S = 1.0
"""How long a failed rank waits for the notes of the others."""


@dataclass(frozen=True, kw_only=True)
class Channels:
    """The process groups of one TorchComm. `control` carries headers, commands and barriers, and is always gloo."""

    data: Any  # a torch.distributed ProcessGroup or one of its backends, which share no public base class
    control: Any
    store: dist.Store
    device: torch.device = torch.device("cpu")
    verify: bool = True


class TorchComm(Traffic):
    """Collectives of torch.distributed under the Comm protocol."""

    def __init__(self, rank: int, size: int, channels: Channels, timeout_s: float = 30.0) -> None:
        super().__init__(rank, size)
        self.channels = channels
        self.timeout_s = timeout_s

    def tree_sum(
        self, nodes: Tensor, tree: ReductionTree, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        check_nodes(nodes, tree, self.rank)
        most = max(tree.node_counts)
        shape = nodes.shape[1:]
        self._begin("tree_sum", nodes.nbytes, most * shape.numel() * 4, tree.fingerprint)
        padded = nodes
        if nodes.shape[0] < most:
            padded = nodes.new_zeros(most, *shape)
            padded[: nodes.shape[0]] = nodes
        gathered = self._gather_equal("tree_sum", padded).view(self.size, most, *shape)
        roots = [gathered[rank, i] for rank, count in enumerate(tree.node_counts) for i in range(count)]
        return finish(roots, tree, bias, dtype)

    def slot(self, nbytes: int) -> int | None:
        return None

    def tree_sum_in_place(
        self, shape: Sequence[int], tree: ReductionTree, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        raise CollectiveError("tree_sum_in_place needs a slot in shared memory and this comm has none; use tree_sum")

    def sum(self, x: Tensor) -> Tensor:
        wide = x.dtype in (torch.bfloat16, torch.float16)
        out = (x.float() if wide else x.clone()).contiguous()
        self._begin("sum", x.nbytes, x.nbytes)
        self._wait("sum", lambda: self.channels.data.allreduce([out]))
        self.over("sum")
        return out.to(x.dtype)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        self._begin("all_reduce_max", x.nbytes, x.nbytes)
        mine = x.contiguous().view(-1).view(torch.uint8)  # gloo knows neither all types nor NaN
        return self._gather_equal("all_reduce_max", mine).view(x.dtype).amax(0).view(x.shape)

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return self._gather("all_gather", x, sizes, dim)

    def gather(self, x: Tensor, sizes: Sequence[int], dim: int, dst: int = 0) -> Tensor | None:
        joined = self._gather("gather", x, sizes, dim)
        return joined if self.rank == dst else None

    def broadcast_bytes(self, payload: bytes | None, timeout: float | None = None) -> bytes:
        limit = self.timeout_s if timeout is None else timeout
        payload = payload or b""
        self.issue("broadcast_bytes", len(payload))
        nbytes = self._compare("broadcast_bytes", len(payload) if self.rank == 0 else 0, limit)
        if nbytes == 0:
            self.over("broadcast_bytes")
            return b""
        data = torch.empty(nbytes, dtype=torch.uint8)
        if self.rank == 0:
            data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        opts = dist.BroadcastOptions()
        opts.rootRank = 0
        opts.timeout = timedelta(seconds=limit)
        self._wait("broadcast_bytes", lambda: self.channels.control.broadcast([data], opts))
        self.over("broadcast_bytes")
        return payload if self.rank == 0 else data.numpy().tobytes()

    def barrier(self, timeout: float | None = None) -> None:
        self.issue("barrier", 0)
        self._compare("barrier", 0, self.timeout_s if timeout is None else timeout)
        self.over("barrier")

    def close(self) -> None:
        if self.broken != "closed":
            self.broken = "closed"
            self.channels = None  # type: ignore[assignment]  # the last reference ends the connections

    def _begin(self, kind: str, nbytes: int, common: int, division: int = 0) -> None:
        """Counts the collective and, where that is checked, compares what all ranks must agree on; `division` stands
        for who brings which part.
        """
        self.issue(kind, nbytes, division if kind == "tree_sum" else 0)
        if self.channels.verify:
            self._compare(kind, common, self.timeout_s, division)

    def _compare(self, kind: str, nbytes: int, limit: float, division: int = 0) -> int:
        """Exchanges (kind, sequence number, division, bytes) with all ranks; raises on all of them where they differ.
        Returns rank 0's bytes, which in a broadcast it alone knows."""
        mine = torch.tensor([KINDS.index(kind), self.sequence, division, nbytes])
        out = torch.empty(self.size * 4, dtype=torch.int64)
        opts = dist.distributed_c10d.AllgatherOptions()
        opts.timeout = timedelta(seconds=limit)
        self._wait(kind, lambda: self.channels.control._allgather_base(out, mine, opts))
        compared = 3 if kind == "broadcast_bytes" else 4
        headers = out.tolist()
        rows = [headers[4 * rank : 4 * rank + 4] for rank in range(self.size)]
        if any(row[:compared] != rows[self.rank][:compared] for row in rows):
            calls = [
                f"rank {rank} is in {KINDS[k]} number {n} of {b} bytes" + (f", divided as {d:08x}" if d else "")
                for rank, (k, n, d, b) in enumerate(rows)
            ]
            raise self._fail(
                f"the ranks are out of step: {'; '.join(calls)}; "
                "all must issue the same collectives, of the same size, in the same order"
            )
        return int(rows[0][3])

    def _gather_equal(self, kind: str, x: Tensor) -> Tensor:
        out = x.new_empty(self.size * x.numel())
        self._wait(kind, lambda: self.channels.data._allgather_base(out, x.contiguous().view(-1)))
        self.over(kind)
        return out.view(self.size, -1)

    def _gather(self, kind: str, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        check_sizes(x, sizes, dim, self.rank, self.size)
        row = x.numel() // max(1, x.shape[dim]) if x.shape[dim] else _row_elements(x, dim)
        self._begin(kind, x.nbytes, sum(sizes) * row * x.element_size(), zlib.crc32(repr(list(sizes)).encode()))
        padded = torch.zeros(max(sizes) * row * x.element_size(), dtype=torch.uint8, device=x.device)
        padded[: x.nbytes] = x.contiguous().view(-1).view(torch.uint8)
        gathered = self._gather_equal(kind, padded)
        parts = []
        for rank, length in enumerate(sizes):
            shape = list(x.shape)
            shape[dim] = length
            nbytes = length * row * x.element_size()
            parts.append(gathered[rank, :nbytes].view(x.dtype).view(shape))
        return torch.cat(parts, dim)

    def _wait(self, kind: str, start: Callable[[], Any]) -> None:
        began = time.monotonic()
        try:
            start().wait()
        except RuntimeError as error:  # torch.distributed raises nothing more precise
            waited = time.monotonic() - began
            cause = str(error).splitlines()[0]
            raise self._fail(
                f"{kind} number {self.sequence} failed on rank {self.rank} after {waited:.1f} s; "
                f"{self._missing(waited)} ({cause})"
            ) from error

    def _missing(self, waited: float) -> str:
        """Which ranks left no note within a moment of the failure; if all did, who had come last."""
        store, keys = self.channels.store, [f"failed/{rank}" for rank in range(self.size)]
        try:
            store.set(keys[self.rank], f"{waited:.1f}")
            deadline = time.monotonic() + ROLL_CALL_S
            while not store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.02)
            absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
            if absent:
                return f"not heard from: ranks {absent}"
            waits = [float(store.get(key)) for key in keys]
            return f"all ranks report a failure, the last to come was rank {waits.index(min(waits))}"
        except RuntimeError:
            return "not heard from: ranks [0] (it hosts the rendezvous store, which does not answer)"

    def _fail(self, message: str) -> CollectiveError:
        self.broken = message
        return CollectiveError(message)


def _row_elements(x: Tensor, dim: int) -> int:
    """Elements per index of dim, where x itself is empty there."""
    shape = list(x.shape)
    del shape[dim]
    return int(torch.Size(shape).numel())
