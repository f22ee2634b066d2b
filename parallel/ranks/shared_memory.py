"""Comm between the ranks of one CPU host through shared memory (kernels: native/src/comm.cpp,
native/src/all_reduce.cpp).

Sums keep the tree's order whatever the number of ranks or the size of the message. A rank that waits spins for some
microseconds, then yields, then sleeps on a futex, and looks every 50 ms whether its peers still live; with more ranks
than cores it yields at once. float16, float64 and integers go through a gather and stock operators. Used by one thread.

A recorded step (parallel.replay) holds its sums as nodes. On the wire they are what computed ones are: the same kinds,
numbers, plans and sizes. So it is each rank's own affair whether it replays a step or computes it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections import Counter, deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.errors import CollectiveError, NativeMemoryError
from parallel.native.comm import MOST_BEGUN, Ledger, Step, comm_library
from parallel.native.compiled import library
from parallel.native.operands import DTYPES, NUMBERS, checked, refused, words
from parallel.ranks.comm import KINDS, Traffic, check_nodes, check_sizes
from parallel.ranks.flight_recorder import COLLECTIVE, Record
from parallel.ranks.shared_segment import MISMATCH, TIMEOUT, Report, cause, map_segment, share
from parallel.replay.program import Program
from parallel.sharding.tree import ReductionTree

SEGMENT_BYTES = 16 << 20
KNOWN_TREES = 4096
CHUNK_BYTES = 1 << 19
"""Larger messages go in rounds of this many bytes per rank, which stay in the caches."""
SPLIT_BYTES = 1 << 15
"""From this size on, three or more ranks divide a sum instead of each computing all of it (bench/collectives.py)."""
OWN_CORE, CROWDED = (50e-6, 2e-3), (0.0, 200e-6)
"""How long a rank spins, and until when it yields, before it sleeps: with a core for each rank, and with fewer."""
PATIENCE_S = 0.2
"""How long one wait for a command may keep Python from seeing a signal."""
NOTHING_SPENT = Ledger().spent
TREE_SUM, SUM, MAXIMUM, ALL_GATHER, GATHER, BROADCAST, BARRIER = range(1, len(KINDS))


class ShmComm(Traffic):
    """Collectives over a mapping shared by all ranks of the group."""

    def __init__(self, rank: int, size: int, mapping: mmap.mmap, cap: int, timeout_s: float, crowded: bool) -> None:
        super().__init__(rank, size)
        self.timeout_s = timeout_s
        self.store: dist.Store | None = None
        self._lib = comm_library()
        self._mapping = mapping
        self._view = (ctypes.c_char * len(mapping)).from_buffer(mapping)
        self._plans: dict[ReductionTree, int] = {}
        self._recent: dict[int, tuple[ReductionTree, int]] = {}  # by id, which is quicker than by value
        self._slot_given: int | None = None
        self._ledger = Ledger()
        self._unfinished: Program | None = None  # a replay of this rank, its sums so far in `_answers`
        self._answers = deque[Step]()
        self.flight.beside = self._begun
        self._handle = self._lib.comm_attach(ctypes.addressof(self._view), rank, size, cap)
        if not self._handle:
            raise NativeMemoryError(f"rank {rank} of {size} has no memory for its end of the group; free some")
        spin, yielding = CROWDED if crowded else OWN_CORE
        self._lib.comm_limits(self._handle, int(spin * 1e9), int(yielding * 1e9), int(timeout_s * 1e9))
        self._in_rank_order = self._plan(tuple([1] * size), (0, *(step for r in range(1, size) for step in (r, -1))))

    @staticmethod
    def meet(store: dist.Store, rank: int, size: int, timeout_s: float = 30.0) -> ShmComm:
        """Maps one segment with all ranks of the group, which meet in a store of their own."""
        cores = share(store, "cores", rank, size, ",".join(map(str, sorted(os.sched_getaffinity(0)))))
        crowded = size > len({core for note in cores for core in note.split(",")})
        cap = max(1 << 18, SEGMENT_BYTES // (2 * size)) & ~4095
        mapping, descriptor = map_segment(store, rank, comm_library().comm_bytes(size, cap))
        try:
            comm = ShmComm(rank, size, mapping, cap, timeout_s, crowded)
            share(store, "mapped", rank, size, "yes")
        finally:
            os.close(descriptor)  # the mappings live on
        comm._lib.comm_watch(comm._handle)
        return comm

    def tree_sum(
        self, nodes: Tensor, tree: ReductionTree, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        check_nodes(nodes, tree, self.rank)
        nodes = checked("tree_sum", "nodes", nodes.detach(), nodes.shape, torch.float32)
        self.issue("tree_sum", nodes.nbytes)
        return self._tree_sum(nodes.data_ptr(), nodes.shape[1:], tree, bias, dtype)

    def slot(self, nbytes: int) -> int | None:
        if self.broken or library.recording():  # the next round's slot is elsewhere
            return None
        address: int | None = self._lib.comm_slot(self._handle, nbytes)
        self._slot_given = self.sequence if address else None
        return address

    def tree_sum_in_place(
        self, shape: Sequence[int], tree: ReductionTree, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        if self._slot_given != self.sequence:
            raise CollectiveError(
                f"tree_sum_in_place on rank {self.rank}: no slot was asked for since the last collective; "
                "call slot(), write the nodes there, then call this"
            )
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
            self._check(BROADCAST, self._send(payload, limit), limit)
            self.over("broadcast_bytes")
            return payload
        total = self._await_message(limit)
        received = ctypes.create_string_buffer(max(1, total))
        self._check(BROADCAST, self._lib.comm_receive(self._handle, received, total, int(limit * 1e9)), limit)
        self.over("broadcast_bytes")
        return received.raw[:total]

    def _send(self, payload: bytes, limit: float) -> int:
        limit_ns = int(limit * 1e9)
        code: int = self._lib.comm_send(self._handle, BROADCAST, self.sequence, payload, len(payload), limit_ns)
        return code

    def barrier(self, timeout: float | None = None) -> None:
        limit = self.timeout_s if timeout is None else timeout
        self.issue("barrier", 0)
        self._check(BARRIER, self._lib.comm_barrier(self._handle, BARRIER, self.sequence, int(limit * 1e9)), limit)
        self.over("barrier")

    def replay(self, program: Program, sums: RecordedSums) -> bool:
        """Runs a recorded step. False where a node that is no sum failed: then the sums before it are over, and who
        computes the step again on this rank is given their results, and joins the others in the rest.
        """
        self.check_whole("a recorded step")
        ledger = self._ledger
        ledger.calls, ledger.spent = self.sequence, NOTHING_SPENT
        status = program.replay()
        done = sums.steps if not status else [s for node, s in sums.by_node.items() if node < program.reached]
        if status and program.reached not in sums.by_node:
            ledger.begun -= len(done)  # they are issued, and noted, when the step is computed
            self._answers, self._unfinished = deque(done), program
            return False
        self.sequence = ledger.calls
        for kind, (count, nbytes) in (sums.totals if not status else RecordedSums.added(done)).items():
            self.counts[kind] += count
            self.byte_counts[kind] += nbytes
            self.seconds[kind] += 1e-9 * ledger.spent[KINDS.index(kind)]
        if status:
            raise self._failure(sums.by_node[program.reached].kind, status, self.timeout_s)
        return True

    def computed(self) -> None:
        """What a replay left unfinished was computed, or failed."""
        self._answers.clear()
        self._unfinished = None

    def close(self) -> None:
        if self._handle is None:
            return
        self._lib.comm_leave(self._handle, 0)
        for plan in self._plans.values():
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
        known = self._recent.get(id(tree)) or self._remember(tree)
        wanted = dtype or torch.float32
        out = torch.empty(shape, dtype=wanted if wanted in NUMBERS else torch.float32)
        if bias is not None:
            bias = bias.detach() if bias.dtype in NUMBERS else bias.detach().float()
            bias = checked("tree_sum", "bias", bias, shape[-1:], *DTYPES)
        self._reduce(TREE_SUM, known[1], nodes, torch.float32, bias, out)
        return out if out.dtype == wanted else out.to(wanted)

    def _remember(self, tree: ReductionTree) -> tuple[ReductionTree, int]:
        if tree not in self._plans:
            self._plans[tree] = self._plan(tree.node_counts, tree.program())
        if len(self._recent) == KNOWN_TREES:
            self._recent.clear()
        self._recent[id(tree)] = (tree, self._plans[tree])  # with the tree, so that no other gets its id
        return self._recent[id(tree)]

    def _plan(self, counts: Sequence[int], program: Sequence[int]) -> int:
        if len(counts) != self.size:
            raise CollectiveError(f"a sum of nodes of {len(counts)} ranks in a group of {self.size}; cut its tree anew")
        c_counts, c_program = (ctypes.c_int * len(counts))(*counts), (ctypes.c_int * len(program))(*program)
        plan: int | None = self._lib.comm_plan(self.size, c_counts, c_program, len(program))
        if not plan:
            raise CollectiveError(
                f"a sum over nodes {tuple(counts)} by the steps {tuple(program)} cannot be followed: each node must be "
                "added once, and one value be left"
            )
        return plan

    def _reduce(
        self, kind: int, plan: int, nodes: int | None, dtype: torch.dtype, bias: Tensor | None, out: Tensor
    ) -> None:
        pointer, width, bias_code = None, 1, 0
        if bias is not None and bias.numel():
            pointer, width, bias_code = bias.data_ptr(), bias.numel(), NUMBERS[bias.dtype]
        if self._answers:
            self._answer(kind, out)
        elif code := self._begin(
            self._handle, plan, kind, nodes, out.numel(), NUMBERS[dtype], pointer, width, bias_code, out.data_ptr(),
            NUMBERS[out.dtype], CHUNK_BYTES, SPLIT_BYTES, kind == MAXIMUM,
        ):  # fmt: skip
            raise self._failure(kind, code, self.timeout_s)
        self.over(KINDS[kind])

    def _begin(self, handle: int | None, plan: int, kind: int, *rest: int | None) -> int:
        """A sum, by the call that a program can hold where somebody records."""
        if not library.recording():
            return int(self._lib.comm_reduce(handle, plan, kind, self.sequence, *rest))
        ledger = self._ledger
        ledger.calls = self.sequence - 1
        code = int(self._lib.comm_step(Step(handle, plan, kind, *rest, self.given, ctypes.addressof(ledger))))
        ledger.begun -= 1  # noted already
        return code

    def _answer(self, kind: int, out: Tensor) -> None:
        """Gives the result that the unfinished replay had."""
        step = self._answers.popleft()
        if (step.kind, step.numel, step.out_type) != (kind, out.numel(), NUMBERS[out.dtype]):
            raise CollectiveError(
                f"rank {self.rank} computes a step with {KINDS[kind]} of {out.numel()} numbers that it replayed with "
                f"{KINDS[step.kind]} of {step.numel}; build a new group"
            )
        ctypes.memmove(out.data_ptr(), step.out, out.nbytes)

    def _begun(self) -> tuple[int, list[Record]]:
        """For the flight recorder: collectives of recorded steps."""
        ledger, count = self._ledger, self._ledger.begun
        last = (ledger.last[i % MOST_BEGUN] for i in range(max(0, count - MOST_BEGUN), count))
        return count, [(1e-9 * b.at, COLLECTIVE, KINDS[b.kind], b.call, b.nbytes) for b in last]

    def _in_order(self, kind: str, x: Tensor) -> Tensor:
        """Sum or maximum, rank after rank."""
        number = KINDS.index(kind)
        if x.dtype not in NUMBERS:
            return self._in_order_stock(number, x)
        x = checked(kind, "x", x.detach(), x.shape, x.dtype)
        self.issue(kind, x.nbytes)
        out = torch.empty(x.shape, dtype=x.dtype)
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
        if x.dim() == 0:
            raise refused(KINDS[kind], "x", words(x), "a number alone has no dimension to join along; give x[None]")
        check_sizes(x, sizes, dim, self.rank, self.size)
        dim = dim % x.dim()
        x = checked(KINDS[kind], "x", x.detach(), x.shape, x.dtype)
        self.issue(KINDS[kind], x.nbytes)
        outer, inner = x.shape[:dim].numel(), x.shape[dim + 1 :].numel() * x.element_size()
        rows = (ctypes.c_uint64 * self.size)(*(length * inner for length in sizes))
        wanted = dst < 0 or dst == self.rank
        out = torch.empty((*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :]) if wanted else (0,), dtype=x.dtype)
        code = self._lib.comm_gather(self._handle, kind, self.sequence, x.data_ptr(), outer, rows, dst, out.data_ptr())
        self._check(kind, code, self.timeout_s)
        self.over(KINDS[kind])
        return out

    def _await_message(self, limit: float) -> int:
        total = ctypes.c_uint64()
        deadline = time.monotonic() + limit
        while True:
            patience = min(PATIENCE_S, max(0.0, deadline - time.monotonic()))
            code = self._peek(patience, total)
            if code != TIMEOUT or time.monotonic() >= deadline:
                self._check(BROADCAST, code, limit)
                return total.value

    def _peek(self, patience: float, total: ctypes.c_uint64) -> int:
        limit_ns = int(patience * 1e9)
        code: int = self._lib.comm_peek(self._handle, BROADCAST, self.sequence, limit_ns, ctypes.byref(total))
        return code

    def _check(self, kind: int, code: int, limit: float) -> None:
        if code:
            raise self._failure(kind, code, limit)

    def _failure(self, kind: int, code: int, limit: float) -> CollectiveError:
        """Says which rank did what instead of taking part, and stops this comm."""
        self._lib.comm_leave(self._handle, code)
        report = (ctypes.c_int64 * (Report.WIDTH * self.size))()
        culprit = self._lib.comm_report(self._handle, report)
        ranks = [Report(*report[Report.WIDTH * r : Report.WIDTH * (r + 1)]) for r in range(self.size)]
        mine = f"{KINDS[kind]} number {self.sequence}"
        said = cause(code, culprit, ranks, limit)
        late = [r for r, other in enumerate(ranks) if r != self.rank and other.rounds < ranks[self.rank].rounds]
        if late and code != MISMATCH:
            said += f"; not heard from: ranks {late}"
        message = f"{mine} on rank {self.rank} of {self.size} failed: {said}"
        self.broken = message
        return CollectiveError(message)


class RecordedSums:
    """The sums among a program's nodes."""

    def __init__(self, program: Program) -> None:
        self.by_node = program.structures(Step)
        self.steps = [*self.by_node.values()]
        self.totals = self.added(self.steps)

    @staticmethod
    def added(steps: Sequence[Step]) -> dict[str, tuple[int, int]]:
        """How many of each kind, and how many bytes this rank gives to them."""
        counts, nbytes = Counter(step.kind for step in steps), Counter[int]()
        for step in steps:
            nbytes[step.kind] += step.nbytes
        return {KINDS[kind]: (count, nbytes[kind]) for kind, count in counts.items()}
