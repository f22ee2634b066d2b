"""Micro benchmark of the CPU attention kernel: prefill, decode and backward, with the Python call included.

    python -m bench.attention --threads 1 --dtype float32 --heads 16 --kv-heads 16 --head-dim 64

Decode rotates over several caches so that keys come from memory. Times are CPU time of the process (--threads 1) or
elapsed time, the best and the median of the runs; other work on the machine only ever slows a run down.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch

from parallel.attention.attend import AttentionMetadata, AttentionSpec, Cached, Causal
from parallel.attention.kv_cache import KVLayout
from parallel.attention.selector import backend_named
from parallel.native.compiled.library import configure


def seconds(run: Callable[[int], object], runs: int, threads: int) -> tuple[float, float]:
    """The best and the median."""
    clock = time.process_time if threads == 1 else time.perf_counter
    run(0)
    times = []
    for i in range(runs):
        start = clock()
        run(i)
        times.append(clock() - start)
    return min(times), sorted(times)[runs // 2]


def report(label: str, times: tuple[float, float], amount: float, unit: str) -> None:
    rate = " ".join(f"{amount / t / 1e9:7.1f}" for t in times)
    print(f"{label:44} best, median: {times[0] * 1e3:8.3f} {times[1] * 1e3:8.3f} ms  {rate} {unit}")


class Bench:
    """One layer's heads, as the options say."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.o, self.dtype = options, getattr(torch, options.dtype)
        self.spec = AttentionSpec(
            0, 1 / math.sqrt(options.head_dim), torch.rand(options.heads) if options.alibi else None
        )

    def qkv(self, tokens: int) -> tuple[torch.Tensor, ...]:
        n, k = self.o.heads, self.o.kv_heads
        return torch.randn(tokens, n + 2 * k, self.o.head_dim).to(self.dtype).split((n, k, k), dim=1)

    def flops(self, tokens: int) -> int:
        """Of a causal prefill: q k and p v."""
        return 2 * self.o.heads * self.o.head_dim * tokens * (tokens + 1)

    def paged(self, queries: list[int], contexts: list[int]) -> tuple[Cached, tuple[torch.Tensor, ...]]:
        size = self.o.block_size
        blocks = [-(-context // size) for context in contexts]
        order = torch.randperm(sum(blocks)).tolist()
        tables = [[order.pop() for _ in range(count)] for count in blocks]
        layout = KVLayout(
            n_layers=1,
            n_kv_heads=self.o.kv_heads,
            head_dim=self.o.head_dim,
            block_size=size,
            dtype=self.dtype,
            device="cpu",
        )
        backend = backend_named("cpu")
        metadata = AttentionMetadata.build(queries, contexts, tables, size)
        return Cached(backend, backend.cache(layout, sum(blocks)), metadata), self.qkv(sum(queries))

    def prefill(self, tokens: int) -> None:
        attend, qkv = self.paged([tokens], [tokens])
        times = seconds(lambda _: attend(self.spec, *qkv), 8, self.o.threads)
        report(f"prefill {tokens}", times, self.flops(tokens), "GFLOP/s")

    def decode(self, batch: int, context: int) -> None:
        bytes_read = 2 * batch * context * self.o.kv_heads * self.o.head_dim * self.dtype.itemsize
        copies = max(2, min(32, math.ceil(300e6 / bytes_read)))
        layers = [self.paged([1] * batch, [context] * batch) for _ in range(copies)]
        times = seconds(lambda i: layers[i % copies][0](self.spec, *layers[i % copies][1]), 3 * copies, self.o.threads)
        report(f"decode batch {batch}, context {context}", times, bytes_read, "GB/s")

    def training(self, tokens: int) -> None:
        leaves = [x.clone().requires_grad_() for x in self.qkv(tokens)]
        attend = Causal([tokens], "cpu")
        o = attend(self.spec, *leaves)
        grad = torch.randn_like(o)
        times = seconds(lambda _: attend(self.spec, *leaves), 6, self.o.threads)
        report(f"training forward {tokens}", times, self.flops(tokens), "GFLOP/s")
        times = seconds(lambda _: torch.autograd.grad(o, leaves, grad, retain_graph=True), 6, self.o.threads)
        report(f"backward {tokens}", times, 2.5 * self.flops(tokens), "GFLOP/s")

    def overhead(self) -> None:
        attend, qkv = self.paged([1] * 16, [1] * 16)
        times = seconds(lambda _: attend(self.spec, *qkv), 300, self.o.threads)
        print(
            f"{'call with 16 sequences of one token':44} best, median: {times[0] * 1e6:8.2f} {times[1] * 1e6:8.2f} us"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16, help="1: multi-query")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--alibi", action="store_true")
    options = parser.parse_args()
    configure(threads=options.threads)
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    bench.overhead()
    for tokens in (128, 1024):
        bench.prefill(tokens)
    for batch, context in ((1, 200), (1, 1000), (16, 200), (16, 1000)):
        bench.decode(batch, context)
    bench.training(1024)


if __name__ == "__main__":
    main()
