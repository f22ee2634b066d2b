"""Comm between the ranks of one CPU host through shared memory (kernels: native/comm*.cpp).

One segment per group, mode 0600, under a random name that is removed as soon as every rank has mapped it: nothing outlives the
processes, however they end. Sums keep the tree's order whatever the number of ranks or the message size. A rank that waits spins
briefly, then yields, then sleeps on a futex; with more ranks than cores it yields at once. float16, float64 and integer sums go through a
gather and stock operators.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.comm import KINDS, Traffic, check_nodes, check_sizes
from parallel.errors import CollectiveError
from parallel.native.library import library
from parallel.tree import ReductionTree

SHM_DIR = Path("/dev/shm")
SEGMENT_BYTES = 32 << 20
CHUNK_BYTES = 1 << 20
"""Larger messages go in rounds of this many bytes per rank, which stay in the caches."""
SPLIT_BYTES = 1 << 20
"""From this size of the result on, ranks divide a sum among them instead of each computing all of it."""
SPIN_S, YIELD_S = 20e-6, 2e-3
PATIENCE_S = 0.2
"""How long one wait for a command may keep Python from seeing a signal."""
TIMEOUT, DIED, LEFT, MISMATCH = 1, 2, 3, 4
CODES = {torch.float32: 0, torch.bfloat16: 1}
TREE_SUM, SUM, MAXIMUM, ALL_GATHER, GATHER, BROADCAST, BARRIER = range(1, len(KINDS))


class ShmComm(Traffic):
    """Collectives over a mapping shared by all ranks of the group."""

    def __init__(self, rank: int, size: int, mapping: mmap.mmap, cap: int, timeout_s: float, crowded: bool) -> None:
        super().__init__(rank, size)
        self.timeout_s = timeout_s
        self._lib = bind(library())
        self._mapping = mapping
        self._view = (ctypes.c_char * len(mapping)).from_buffer(mapping)
        self._plans: dict[int, tuple[object, int]] = {}
        self._handle = self._lib.comm_attach(ctypes.addressof(self._view), rank, size, cap)
        spin, yielding = (0.0, SPIN_S) if crowded else (SPIN_S, YIELD_S)
        self._lib.comm_limits(self._handle, int(spin * 1e9), int(yielding * 1e9), int(timeout_s * 1e9))
        self._in_rank_order = self._plan(tuple([1] * size), (0, *(step for r in range(1, size) for step in (r, -1))))

    @staticmethod
    def meet(store: dist.Store, rank: int, size: int, timeout_s: float = 30.0) -> ShmComm:
        """Maps one segment with all ranks of the group, which meet in a store of their own."""
        cores = _share(store, "cores", rank, size, ",".join(map(str, sorted(os.sched_getaffinity(0)))))
        crowded = size > len({core for note in cores for core in note.split(",")})
        cap = max(1 << 18, SEGMENT_BYTES // (2 * size)) & ~4095
        mapping, path = _map(store, rank, bind(library()).comm_bytes(size, cap))
        try:
            comm = ShmComm(rank, size, mapping, cap, timeout_s, crowded)
            _share(store, "mapped", rank, size, "yes")
        finally:
            path.unlink(missing_ok=True)  # by whichever rank gets here first; the mappings live on
        comm._lib.comm_watch(comm._handle)
        return comm

    def tree_sum(
        self, nodes: Tensor, tree: ReductionTree, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        check_nodes(nodes, tree, self.rank)
        nodes = nodes.contiguous()
        self.issue("tree_sum", nodes.nbytes)
        return self._tree_sum(nodes.data_ptr(), nodes.shape[1:], tree, bias, dtype)

    def slot(self, nbytes: int) -> int | None:
        return self._lib.comm_slot(self._handle, nbytes)  # type: ignore[no-any-return]

    def tree_sum_in_place(
        self, shape: Sequence[int], tree: ReductionTree, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        size = torch.Size(shape)
        self.issue("tree_sum", tree.node_counts[self.rank] * size.numel() * 4)
        return self._tree_sum(None, size, tree, bias, dtype)

    def sum(self, x: Tensor) -> Tensor:
        return self._in_order("sum", x)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return self._in_order("all_reduce_max", x)

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return self._join(ALL_GATHER, x, sizes, dim, -1)

    def gather(self, x: Tensor, sizes: Sequence[int], dim: int, dst: int = 0) -> Tensor | None:
        joined = self._join(GATHER, x, sizes, dim, dst)
        return joined if self.rank == dst else None

    def broadcast_bytes(self, payload: bytes | None, timeout: float | None = None) -> bytes:
        limit = self.timeout_s if timeout is None else timeout
        payload = payload or b""
        self.issue("broadcast_bytes", len(payload))
        if self.rank == 0:
            self._check(BROADCAST, self._lib.comm_send(self._handle, self.sequence, payload, len(payload), int(limit * 1e9)), limit)
            return payload
        total = self._await_message(limit)
        received = ctypes.create_string_buffer(max(1, total))
        self._check(BROADCAST, self._lib.comm_receive(self._handle, received, total, int(limit * 1e9)), limit)
        return received.raw[:total]

    def barrier(self, timeout: float | None = None) -> None:
        limit = self.timeout_s if timeout is None else timeout
        self.issue("barrier", 0)
        self._check(BARRIER, self._lib.comm_barrier(self._handle, BARRIER, self.sequence, int(limit * 1e9)), limit)

    def close(self) -> None:
        if self._handle is None:
            return
        self._lib.comm_leave(self._handle, 0)
        for _, plan in self._plans.values():
            self._lib.comm_plan_free(plan)
        self._lib.comm_plan_free(self._in_rank_order)
        self._lib.comm_detach(self._handle)
        self._handle = None
        self.broken = self.broken or "closed"
        del self._view
        self._mapping.close()

    def _tree_sum(
        self, nodes: int | None, shape: torch.Size, tree: ReductionTree, bias: Tensor | None, dtype: torch.dtype | None
    ) -> Tensor:
        known = self._plans.get(id(tree))
        if known is None:  # kept with the tree, whose id then stays its own
            known = self._plans[id(tree)] = (tree, self._plan(tree.node_counts, tree.program()))
        wanted = dtype or torch.float32
        out = torch.empty(shape, dtype=wanted if wanted in CODES else torch.float32)
        self._reduce(TREE_SUM, known[1], nodes, torch.float32, bias, out)
        return out if out.dtype == wanted else out.to(wanted)

    def _plan(self, counts: Sequence[int], program: Sequence[int]) -> int:
        c_counts, c_program = (ctypes.c_int * len(counts))(*counts), (ctypes.c_int * len(program))(*program)
        return self._lib.comm_plan(self.size, c_counts, c_program, len(program))  # type: ignore[no-any-return]

    def _reduce(self, kind: int, plan: int, nodes: int | None, dtype: torch.dtype, bias: Tensor | None, out: Tensor) -> None:
        pointer, width, bias_code = None, 1, 0
        if bias is not None:
            bias = bias.contiguous() if bias.dtype in CODES else bias.float()
            pointer, width, bias_code = bias.data_ptr(), bias.numel(), CODES[bias.dtype]
        code = self._lib.comm_reduce(
            self._handle, plan, kind, self.sequence, nodes, out.numel(), CODES[dtype], pointer, width, bias_code,
            out.data_ptr(), CODES[out.dtype], CHUNK_BYTES, SPLIT_BYTES, kind == MAXIMUM,
        )  # fmt: skip
        if code:
            raise self._failure(kind, code, self.timeout_s)

    def _in_order(self, kind: str, x: Tensor) -> Tensor:
        """Sum or maximum, rank after rank."""
        number = KINDS.index(kind)
        if x.dtype not in CODES:
            return self._in_order_stock(number, x)
        x = x.contiguous()
        self.issue(kind, x.nbytes)
        out = torch.empty_like(x)
        self._reduce(number, self._in_rank_order, x.data_ptr(), x.dtype, None, out)
        return out

    def _in_order_stock(self, number: int, x: Tensor) -> Tensor:
        parts = self._join(number, x.unsqueeze(0), [1] * self.size, 0, -1)
        wide = parts.float() if x.dtype == torch.float16 else parts
        total = wide[0]
        for part in wide[1:]:
            total = total + part if number == SUM else torch.maximum(total, part)
        return total.to(x.dtype)

    def _join(self, kind: int, x: Tensor, sizes: Sequence[int], dim: int, dst: int) -> Tensor:
        check_sizes(x, sizes, dim, self.rank, self.size)
        dim = dim % x.dim()
        x = x.contiguous()
        self.issue(KINDS[kind], x.nbytes)
        outer, inner = x.shape[:dim].numel(), x.shape[dim + 1 :].numel() * x.element_size()
        rows = (ctypes.c_uint64 * self.size)(*(length * inner for length in sizes))
        wanted = dst < 0 or dst == self.rank
        out = torch.empty((*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :]) if wanted else (0,), dtype=x.dtype)
        code = self._lib.comm_gather(self._handle, kind, self.sequence, x.data_ptr(), outer, rows, dst, out.data_ptr())
        self._check(kind, code, self.timeout_s)
        return out

    def _await_message(self, limit: float) -> int:
        total = ctypes.c_uint64()
        deadline = time.monotonic() + limit
        while True:
            patience = min(PATIENCE_S, max(0.0, deadline - time.monotonic()))
            code = self._lib.comm_peek(self._handle, self.sequence, int(patience * 1e9), ctypes.byref(total))
            if code != TIMEOUT or time.monotonic() >= deadline:
                self._check(BROADCAST, code, limit)
                return total.value

    def _check(self, kind: int, code: int, limit: float) -> None:
        if code:
            raise self._failure(kind, code, limit)

    def _failure(self, kind: int, code: int, limit: float) -> CollectiveError:
        """Says which rank did what instead of taking part, and stops this comm."""
        self._lib.comm_leave(self._handle, 1)
        report = (ctypes.c_int64 * (6 * self.size))()
        culprit = self._lib.comm_report(self._handle, report)
        ranks = [Report(*report[6 * r : 6 * r + 6]) for r in range(self.size)]
        mine = f"{KINDS[kind]} number {self.sequence}"
        if code == MISMATCH:
            there = ranks[culprit].last if kind != BROADCAST else "another call (its broadcast has another number)"
            here = ranks[self.rank].last if kind != BROADCAST else mine
            message = (
                f"the ranks are out of step: rank {culprit} is in {there}, rank {self.rank} in {here}; "
                "all must issue the same collectives, of the same size, in the same order"
            )
        else:
            message = f"{mine} on rank {self.rank} of {self.size}: " + _absence(code, culprit, ranks, self.rank, limit)
        self.broken = message
        return CollectiveError(message)


class Report:
    """What a rank's lines in shared memory say about it."""

    def __init__(self, rounds: int, kind: int, nbytes: int, call: int, state: int, died: int) -> None:
        self.rounds = rounds
        self.last = f"{KINDS[kind]} number {call} of {nbytes} bytes" if rounds else "no collective yet"
        self.left = {2: "closed its end", 3: "stopped after an error of its own"}.get(state)
        self.died = bool(died)


def _absence(code: int, culprit: int, ranks: Sequence[Report], rank: int, limit: float) -> str:
    last = f"its last: {ranks[culprit].last}"
    if code == DIED:
        return f"the process of rank {culprit} died ({last})"
    if code == LEFT:
        return f"rank {culprit} {ranks[culprit].left} ({last})"
    late = [r for r, report in enumerate(ranks) if r != rank and report.rounds < ranks[rank].rounds] or [culprit]
    return f"rank {culprit} did not arrive within {limit:g} s ({last}); not heard from: ranks {late}"


def _share(store: dist.Store, name: str, rank: int, size: int, note: str) -> list[str]:
    """Every rank's note, once all have left one."""
    store.set(f"{name}/{rank}", note)
    keys = [f"{name}/{r}" for r in range(size)]
    try:
        store.wait(keys)
    except RuntimeError as error:
        absent = [r for r, key in enumerate(keys) if not store.check([key])]
        raise CollectiveError(f"ranks {absent} of {size} did not come to the start of the group ({name})") from error
    return [store.get(key).decode() for key in keys]


def _map(store: dist.Store, rank: int, nbytes: int) -> tuple[mmap.mmap, Path]:
    """The group's segment: made by rank 0 once all ranks are there, opened by the others."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    if rank == 0:
        path, fd = _create(nbytes, flags | os.O_CREAT | os.O_EXCL)
        store.set("segment", str(path))
    else:
        path = Path(store.get("segment").decode())
        fd = os.open(path, flags)
    try:
        return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)), path
    finally:
        os.close(fd)


def _create(nbytes: int, flags: int) -> tuple[Path, int]:
    """A new file with its memory reserved: a full /dev/shm must be an error here, not a bus error later."""
    failures = []
    for folder in (SHM_DIR, Path(tempfile.gettempdir())):
        path = folder / f"tp-decoders-{secrets.token_hex(16)}"
        try:
            fd = os.open(path, flags, 0o600)
            try:
                os.posix_fallocate(fd, 0, nbytes)
                return path, fd
            except OSError:
                os.close(fd)
                path.unlink()
                raise
        except OSError as error:
            failures.append(str(error))
    raise CollectiveError(f"no room for {nbytes >> 20} MiB of shared memory ({'; '.join(failures)}); enlarge {SHM_DIR}")


def bind(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the argument types of the comm_* functions; done once per library."""
    p, i, u32, u64, i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64
    signatures = {
        "comm_bytes": (u64, [i, u64]),
        "comm_attach": (p, [p, i, i, u64]),
        "comm_watch": (None, [p]),
        "comm_limits": (None, [p, i64, i64, i64]),
        "comm_leave": (None, [p, i]),
        "comm_detach": (None, [p]),
        "comm_plan": (p, [i, p, p, i]),
        "comm_plan_free": (None, [p]),
        "comm_slot": (p, [p, u64]),
        "comm_reduce": (i, [p, p, u32, u64, p, i64, i, p, i64, i, p, i, u64, u64, i]),
        "comm_gather": (i, [p, u32, u64, p, u64, p, i, p]),
        "comm_barrier": (i, [p, u32, u64, i64]),
        "comm_send": (i, [p, u64, ctypes.c_char_p, u64, i64]),
        "comm_peek": (i, [p, u64, i64, p]),
        "comm_receive": (i, [p, p, u64, i64]),
        "comm_report": (i, [p, p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
