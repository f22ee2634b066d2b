"""Serving throughput side by side with transformers' generate: same checkpoint, token ids, dtype and threads, in one
run.

    python bench/serving.py --models DIR --model gpt_neox --dtype float32 --engines tp2,tp1,hf

Every engine is a process (tp2: two, one pinned core each; tp1 and hf: one with two threads) that waits for its
turn, so that engines are timed in alternation, A B C A B C, and share the machine's mood. Greedy, end-of-sequence
ignored. Tasks, and what is counted:

    decode   1 request, prompt 32, 128 new        new tokens / wall time
    batch    16 at once, prompt 128, 64 new       new tokens / wall time, prefill included
    mixed    16 at once, prompts 16-256, 16-128   new tokens / wall time, prefill included
    prefill  1 request, prompt 1024, 1 new        prompt tokens / wall time

Prints one JSON line per engine and task (median, minimum and maximum rate; overhead = everything but the forward,
share of a step), then ratios. `--make` writes the random checkpoints (seed 0) first. transformers runs its best
attention for the family.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import socket
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

VOCAB = {"gpt2": 50257, "gpt_neox": 50304, "gpt_bigcode": 49152, "mpt": 50432, "gpt_neox_japanese": 32000}
TASKS = ("decode", "batch", "mixed", "prefill")
Work = tuple[list[list[int]], list[int], int]


def prompts_of(lengths: list[int], vocab: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(10, vocab - 10) for _ in range(n)] for n in lengths]


def workload(task: str, vocab: int) -> Work:
    """(prompts, new tokens of each, tokens counted)."""
    rng = random.Random(0)
    prompts, outputs = [rng.randint(16, 256) for _ in range(16)], [rng.randint(16, 128) for _ in range(16)]
    return {
        "decode": (prompts_of([32], vocab, 1), [128], 128),
        "batch": (prompts_of([128] * 16, vocab, 2), [64] * 16, 64 * 16),
        "mixed": (prompts_of(prompts, vocab, 3), outputs, sum(outputs)),
        "prefill": (prompts_of([1024], vocab, 4), [1], 1024),
    }[task]


def make_models(folder: Path, names: list[str]) -> None:
    """Random checkpoints of about the sizes people run on CPUs: GPT-2 124M, NeoX 410M, ..."""
    import transformers as t

    wide = {"n_positions": 2048, "n_embd": 1024, "n_layer": 24, "n_head": 16}
    configs = {
        "gpt2": lambda: t.GPT2Config(vocab_size=VOCAB["gpt2"], n_positions=2048, n_embd=768, n_layer=12, n_head=12),
        "gpt_neox": lambda: t.GPTNeoXConfig(
            vocab_size=VOCAB["gpt_neox"], hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
            intermediate_size=4096, rotary_pct=0.25, max_position_embeddings=2048, use_parallel_residual=True,
            tie_word_embeddings=False,
        ),
        "gpt_bigcode": lambda: t.GPTBigCodeConfig(vocab_size=VOCAB["gpt_bigcode"], multi_query=True, **wide),
        "mpt": lambda: t.MptConfig(
            vocab_size=VOCAB["mpt"], d_model=1024, n_heads=16, n_layers=12, max_seq_len=2048, expansion_ratio=4
        ),
        "gpt_neox_japanese": lambda: t.GPTNeoXJapaneseConfig(
            vocab_size=VOCAB["gpt_neox_japanese"], hidden_size=1024, num_hidden_layers=12, num_attention_heads=16,
            intermediate_multiple_size=4, max_position_embeddings=2048,
        ),
    }  # fmt: skip
    for name in names:
        if not (folder / name / "model.safetensors").exists():
            torch.manual_seed(0)
            t.AutoModelForCausalLM.from_config(configs[name]()).save_pretrained(folder / name, safe_serialization=True)


class Ours:
    """Rank 0 of a tensor-parallel group, or a single rank with two threads."""

    def __init__(
        self, path: Path, dtype: torch.dtype, rank: int, tp: int, port: int, numerics: str, threads: int
    ) -> None:
        from cluster.actors.group.placement import Place
        from cluster.actors.host.cpu_affinity import claim_cores
        from cluster.engine.engine_builder import build_engine, build_runner
        from cluster.engine.engine_config import EngineConfig
        from cluster.engine.run.command_stream import Commands
        from cluster.engine.run.executors import follow
        from parallel.native.compiled.library import set_threads
        from parallel.ranks.mesh import Wiring, init_groups
        from tp_decoders.checkpoint.load_save import load

        torch.set_num_threads(1)
        if tp > 1:
            claim_cores(Place(rank=rank, world=tp, node="", local_rank=rank, local_size=tp), 1, "cpu")
        else:
            set_threads(threads)
        address, wiring = f"tcp://127.0.0.1:{port}", Wiring(key=b"bench")
        self.groups = init_groups(rank, tp, tp, 1, address, wiring=wiring, numerics=numerics)  # type: ignore[arg-type]
        group = self.groups.tp
        config = EngineConfig(kv_blocks=512, max_step_tokens=1024, max_sequences=16, prefix_caching=False)
        self.runner = build_runner(load(path, group=group, dtype=dtype), config, 0)
        commands = Commands(group.comm, silence_s=600.0) if tp > 1 else None
        if rank > 0:
            assert commands is not None, "followers have a group"
            follow(self.runner, commands)
            return
        self.commands, self.engine = commands, build_engine(self.runner, config, (), commands)

    def generate(self, prompts: list[list[int]], outputs: list[int]) -> list[list[int]]:
        from cluster.engine.request import Request, SamplingParams, StoppingCriteria

        self.made: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
        before = self.engine.load()
        for i, (prompt, n) in enumerate(zip(prompts, outputs, strict=True)):
            stopping = StoppingCriteria(max_new_tokens=n, ignore_eos=True)
            self.engine.submit(
                Request(
                    request_id=str(i),
                    token_ids=tuple(prompt),
                    sampling=SamplingParams(temperature=0.0),
                    stopping=stopping,
                )
            )
        while not self.engine.idle:
            for event in self.engine.step():
                self.made[event.request_id] += event.token_ids
        after = self.engine.load()
        total = after.step_seconds - before.step_seconds
        self.overhead = 1.0 - (after.forward_seconds - before.forward_seconds) / total if total else 0.0
        return [self.made[str(i)] for i in range(len(prompts))]


class Transformers:
    """generate() on a left-padded static batch; only the wanted tokens count."""

    overhead = None

    def __init__(self, path: Path, dtype: torch.dtype, threads: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        kind = "eager" if path.name in ("mpt", "gpt_neox_japanese") else "sdpa"
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=kind).eval()
        generation = self.model.generation_config
        generation.eos_token_id, generation.pad_token_id, generation.bos_token_id, generation.do_sample = (
            None,
            0,
            None,
            False,
        )

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], outputs: list[int]) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        attend = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        made = self.model.generate(ids, attention_mask=attend, max_new_tokens=max(outputs), use_cache=True)[
            :, width:
        ].tolist()
        return [row[:n] for row, n in zip(made, outputs, strict=True)]


def serve(
    pipe: Connection | None,
    name: str,
    path: Path,
    dtype: torch.dtype,
    rank: int,
    port: int,
    numerics: str,
    threads: int,
) -> None:
    """A process of an engine; the first one takes work from the pipe."""
    engine: Ours | Transformers
    if name == "hf":
        engine = Transformers(path, dtype, threads)
    else:
        engine = Ours(path, dtype, rank, int(name.removeprefix("tp")), port, numerics, threads)
    if pipe is None:
        return
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        started = time.perf_counter()
        made = engine.generate(*work)
        pipe.send((time.perf_counter() - started, engine.overhead, made))
    if isinstance(engine, Ours):
        engine.engine.close()


class Engine:
    """An engine's processes, seen from the parent."""

    def __init__(self, label: str, name: str, options: argparse.Namespace, numerics: str) -> None:
        self.label = label
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        size = 1 if name == "hf" else int(name.removeprefix("tp"))
        dtype = getattr(torch, options.dtype)
        self.processes = [
            context.Process(
                target=serve,
                args=(
                    theirs if rank == 0 else None,
                    name,
                    options.models / options.model,
                    dtype,
                    rank,
                    port,
                    numerics,
                    options.threads,
                ),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()
        theirs.close()
        assert self.pipe.poll(300) and self.pipe.recv() == "ready", f"{label} did not start"

    def run(self, prompts: list[list[int]], outputs: list[int]) -> tuple[float, float | None, list[list[int]]]:
        self.pipe.send((prompts, outputs))
        assert self.pipe.poll(1200), f"{self.label} did not answer"
        return self.pipe.recv()  # type: ignore[no-any-return]

    def close(self) -> None:
        self.pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def busy_elsewhere(seconds: float = 0.3) -> float:
    """Cores in use by anyone during a short sleep."""
    before = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    time.sleep(seconds)
    after = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    busy = sum(after) - sum(before) - (after[3] - before[3]) - (after[4] - before[4])
    return busy / os.sysconf("SC_CLK_TCK") / seconds


def measure(engines: list[Engine], task: str, options: argparse.Namespace) -> None:
    prompts, outputs, counted = workload(task, VOCAB[options.model])
    rates: dict[str, list[float]] = {engine.label: [] for engine in engines}
    overheads: dict[str, list[float]] = {engine.label: [] for engine in engines}
    heads: dict[str, list[int]] = {}
    noise = 0.0
    for turn in range(options.runs + 1):
        for engine in engines:
            noise = max(noise, busy_elsewhere())
            seconds, overhead, made = engine.run(prompts, outputs if turn else [min(4, n) for n in outputs])
            if turn:  # the first round warms up
                rates[engine.label].append(counted / seconds)
                overheads[engine.label].append(overhead or 0.0)
                heads[engine.label] = made[0][:8]
    for label, values in rates.items():
        row = {
            "model": options.model, "dtype": options.dtype, "task": task, "engine": label, "unit": "tok/s",
            "median": round(statistics.median(values), 2), "min": round(min(values), 2), "max": round(max(values),
            2), "n": len(values), "overhead": round(statistics.median(overheads[label]), 4), "head": heads[label],
            "cores_busy_between": round(noise, 2),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
    first = statistics.median(rates[engines[0].label])
    for label, values in list(rates.items())[1:]:
        print(f"  {task}: {engines[0].label} / {label} = {first / statistics.median(values):.2f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--model", choices=sorted(VOCAB), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--engines", default="tp2,hf", help="comma-separated: tp1, tp2, ..., hf")
    parser.add_argument("--numerics", default="invariant", help="comma-separated: invariant, fast")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--threads", type=int, default=2, help="threads of single-process engines")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--make", action="store_true", help="write missing checkpoints first")
    options = parser.parse_args()
    if options.make:
        make_models(options.models, [options.model])
    labels = [
        (name if name == "hf" else f"{name} {numerics}", name, numerics)
        for name in options.engines.split(",")
        for numerics in (options.numerics.split(",") if name != "hf" else ["-"])
    ]
    engines = [Engine(label, name, options, numerics) for label, name, numerics in labels]
    try:
        for task in options.tasks.split(","):
            measure(engines, task, options)
    finally:
        for engine in engines:
            engine.close()
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])
    sys.exit(main())
