"""What a collective costs between ranks of this host: shared memory beside gloo, by kind and size.

    python bench/collectives.py [--ranks 2] [--comms shm gloo] [--seconds 0.3] [--split]

Every rank is a process of its own, pinned to its share of the cores. Prints the median and the 99th
percentile in microseconds on rank 0, Python call included; sizes are those of one rank's node or tensor in float32
(half of it in bfloat16). `--split` compares, for tree_sum, every rank computing everything with ranks dividing the sum:
the basis of SPLIT_BYTES.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import parallel.ranks.shared_memory
from cluster.actors.group.placement import Place
from cluster.actors.host.cpu_affinity import claim_cores
from parallel.ranks.comm import Comm
from parallel.ranks.mesh import Wiring, init_groups
from parallel.sharding.tree import ReductionTree

SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
Call = Callable[[], object]


@dataclass(frozen=True)
class Options:
    ranks: int
    comm: str
    seconds: float
    split: bool
    address: str


def calls(comm: Comm, nbytes: int) -> Iterator[tuple[str, Call]]:
    """The collectives to time, on tensors of their own."""
    n = nbytes // 4
    tree = ReductionTree.over(8, comm.size)
    nodes, x = torch.randn(tree.node_counts[comm.rank], n), torch.randn(n)
    low, sizes, bias = x.bfloat16(), [n] * comm.size, torch.randn(n)
    payload = bytes(nbytes) if comm.rank == 0 else None
    yield "tree_sum f32", lambda: comm.tree_sum(nodes, tree)
    yield "tree_sum bf16 +bias", lambda: comm.tree_sum(nodes, tree, bias, torch.bfloat16)
    yield "sum f32", lambda: comm.sum(x)
    yield "sum bf16", lambda: comm.sum(low)
    yield "all_gather f32", lambda: comm.all_gather(x, sizes, 0)
    yield "broadcast_bytes", lambda: comm.broadcast_bytes(payload)


def timed(comm: Comm, call: Call, seconds: float) -> tuple[float, float]:
    """Median and 99th percentile in microseconds; all ranks make the same number of calls."""
    comm.barrier()
    began = time.perf_counter()
    for _ in range(5):
        call()
    rounds = torch.tensor([int(seconds * 5 / (time.perf_counter() - began)) + 10])
    times = []
    for _ in range(min(20_000, int(comm.all_reduce_max(rounds)))):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    times.sort()
    return times[len(times) // 2] * 1e6, times[len(times) * 99 // 100] * 1e6


def table(comm: Comm, options: Options) -> dict[tuple[str, int], tuple[float, float]]:
    found = {}
    for nbytes in SIZES:
        for name, call in calls(comm, nbytes):
            if not options.split:
                found[name, nbytes] = timed(comm, call, options.seconds)
                continue
            if name.startswith("tree_sum"):
                for label, threshold in (("all by all", 1 << 62), ("divided", 0)):
                    parallel.ranks.shared_memory.SPLIT_BYTES = threshold
                    found[f"{name}, {label}", nbytes] = timed(comm, call, options.seconds)
    return found


def work(rank: int, options: Options, results: mp.Queue[dict[tuple[str, int], tuple[float, float]]]) -> None:
    place = Place(rank=rank, world=options.ranks, node="", local_rank=rank, local_size=options.ranks)
    claim_cores(place, 1, "cpu")
    wiring = Wiring(transport=options.comm)  # type: ignore[arg-type]
    groups = init_groups(rank, options.ranks, options.ranks, 1, options.address, wiring=wiring)
    found = table(groups.tp.talk, options)
    if rank == 0:
        results.put(found)
    groups.tp.talk.barrier()
    groups.close()


def measure(options: Options) -> dict[tuple[str, int], tuple[float, float]]:
    context = mp.get_context("spawn")
    results: mp.Queue[dict[tuple[str, int], tuple[float, float]]] = context.Queue()
    processes = [context.Process(target=work, args=(rank, options, results)) for rank in range(options.ranks)]
    for process in processes:
        process.start()
    found = results.get(timeout=600)
    for process in processes:
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--comms", nargs="+", default=["shm", "gloo"], choices=["shm", "gloo"])
    parser.add_argument("--seconds", type=float, default=0.3, help="per figure")
    parser.add_argument("--split", action="store_true")
    given = parser.parse_args()
    for comm in ["shm"] if given.split else given.comms:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Options(given.ranks, comm, given.seconds, given.split, f"file://{folder}/meet"))
        print(f"\n{given.ranks} ranks, {comm}: p50 / p99 in microseconds")
        print("| | " + " | ".join(f"{nbytes >> 10} KB" for nbytes in SIZES) + " |")
        print("|---" * (len(SIZES) + 1) + "|")
        for name in dict.fromkeys(name for name, _ in found):
            row = [f"{found[name, nbytes][0]:.1f} / {found[name, nbytes][1]:.0f}" for nbytes in SIZES]
            print(f"| {name} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
