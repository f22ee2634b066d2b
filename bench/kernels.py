"""Micro benchmark of the native CPU kernels: GB/s of weights and GFLOP/s beside F.linear and oneDNN's packed product.

    python -m bench.kernels --threads 1 --dtype float32 --rows 1 16 512 --shapes 4096x1024 1024x4096

In bfloat16 also with the weights in 8 and in 4 bits: their GB/s are those of the bfloat16 weights they stand for.
Weights rotate through more memory than the caches hold. Cells are the best of many calls, because other work on the
machine only ever slows a call down; the instruction set in use and the measured peak of a register-only loop, which
AMX's tiles exceed, stand at the top.
"""

import argparse
import ctypes
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.native.compiled.library import configure, in_use, library
from parallel.native.gemm import Source, product
from parallel.native.packed_weight import PackedMatrix
from parallel.options import Scheme
from parallel.quantisation.quantised_weight import QuantisedMatrix
from parallel.quantisation.schemes import quantised

SHAPES = ("4096x1024", "1024x4096", "3072x1024", "50304x1024", "2304x768")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024)


def best_seconds(runs: dict[str, Callable[[int], object]], budget: float) -> dict[str, float]:
    """The shortest call of each route; the routes take turns, so that whatever else runs here meets all of them."""
    best = dict.fromkeys(runs, float("inf"))
    begin, i = time.perf_counter(), 0
    while runs and (i < 4 or time.perf_counter() - begin < budget * len(runs)):
        for turn, (name, run) in enumerate(runs.items()):
            start = time.perf_counter()
            run(i * len(runs) + turn)
            best[name] = min(best[name], time.perf_counter() - start)
        i += 1
    return best


def peak_gflops(half: bool, threads: int) -> float:
    """What a loop of fused multiply-adds on registers alone reaches on one thread, times the threads."""
    function = library().gemm_peak_gflops
    function.restype = ctypes.c_double
    return max(function(ctypes.c_int(half)) for _ in range(5)) * threads


def tree_of(k: int, leaves: int) -> tuple[int, ...]:
    return tuple(k * i // leaves for i in range(leaves + 1))


def routes(x: Tensor, weights: list[Tensor], leaves: int, rows: int) -> dict[str, Callable[[int], object]]:
    """One call per route; the i-th call uses the i-th weight in turn."""
    count, k = len(weights), x.shape[1]
    packed = [PackedMatrix.pack(w) for w in weights]
    onednn = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]
    one, several = (0, k), tree_of(k, leaves)
    found = {
        "native": lambda i: product([Source(x, packed[i % count], one)]),
        f"native/{leaves} leaves": lambda i: product([Source(x, packed[i % count], several)]),
        "oneDNN": lambda i: torch.ops.mkldnn._linear_pointwise(x, onednn[i % count], None, "none", [], ""),
        "F.linear": lambda i: F.linear(x, weights[i % count]),
    }
    return found | (_quantised(x, weights) if x.dtype is torch.bfloat16 else {})


def _quantised(x: Tensor, weights: list[Tensor]) -> dict[str, Callable[[int], object]]:
    """The same weights in 8 and in 4 bits: as many again, so that they do not stay in the caches."""
    found: dict[str, Callable[[int], object]] = {}
    kinds: tuple[tuple[Scheme, int], ...] = (("int8", 2), ("int4", 4))
    for scheme, copies in kinds:
        made = [quantised(scheme, w) for w in weights]
        packed = [QuantisedMatrix(one) for one in made for _ in range(copies)]
        found[scheme] = partial(_product, x, packed)
    return found


def _product(x: Tensor, packed: Sequence[QuantisedMatrix], i: int) -> Tensor:
    return product([Source(x, packed[i % len(packed)], (0, x.shape[1]))])


def measure(shape: str, dtype: torch.dtype, rows: list[int], leaves: int, budget: float, only: list[str]) -> None:
    n, k = map(int, shape.split("x"))
    size = n * k * dtype.itemsize
    weights = [torch.randn(n, k).to(dtype) for _ in range(max(1, min(24, (160 << 20) // size)))]
    for m in rows:
        x = torch.randn(m, k).to(dtype)
        runs = {
            name: run for name, run in routes(x, weights, leaves, m).items() if not only or name.split("/")[0] in only
        }
        ours = {name: run for name, run in runs.items() if name.startswith(("native", "int"))}
        torchs = {name: run for name, run in runs.items() if name not in ours}
        cells = []  # the two kinds apart: torch's threads spin for a while after each of its calls
        for name, seconds in (best_seconds(ours, budget) | best_seconds(torchs, budget)).items():
            rates = f"{size / seconds / 1e9:5.1f} GB/s {2 * m * n * k / seconds / 1e9:6.1f} GF"
            cells.append(f"{name} {seconds * 1e6:9.1f} us {rates}")
        print(f"{shape:>11} M={m:<5} " + " | ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--leaves", type=int, default=8)
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per cell and route")
    parser.add_argument("--only", nargs="*", default=[], help="routes: native int8 int4 oneDNN F.linear")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    configure(threads=args.threads)
    dtype = getattr(torch, args.dtype)
    peak = peak_gflops(dtype == torch.bfloat16, args.threads)
    print(f"{args.dtype}, {args.threads} threads, kernels {in_use()}, peak of a loop on registers {peak:.0f} GFLOP/s")
    with torch.inference_mode():
        for shape in args.shapes:
            measure(shape, dtype, args.rows, args.leaves, args.budget, args.only)


if __name__ == "__main__":
    main()
