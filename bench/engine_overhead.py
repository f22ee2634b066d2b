"""What the engine costs besides the model: scheduling, sending the plan, taking tokens in, drawing them.

    python bench/engine_overhead.py [--batch 16] [--steps 2000] [--vocab 50304]
    python bench/engine_overhead.py --model DIR --dtype bfloat16 [--steps 100]      a real model, in this process

The executor is a stub that returns a token per row at once, so the time of a step is the engine's own. Drawing is
timed by itself on random logits, because greedy rows never leave their ranks. With a real model, `EngineLoad` tells
both times (step_seconds and forward_seconds). Prints microseconds per decode step, median and 90th percentile.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from msgspec import msgpack

from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.kv_cache.block_pool import BlockPool
from cluster.engine.request import ModelLimits, Request, SamplingParams, StoppingCriteria
from cluster.engine.sample.sampler import Sampler
from cluster.engine.schedule.scheduler import Scheduler
from cluster.engine.schedule.step_plan import StepPlan, StepResult
from parallel.native.compiled import library as native
from tp_decoders import load

KINDS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8, seed=1),
    "top-k 50": SamplingParams(top_k=50, seed=1),
    "top-p 0.9": SamplingParams(top_p=0.9, seed=1),
    "penalties": SamplingParams(repetition_penalty=1.1, frequency_penalty=0.2, seed=1),
}


def scheduler_with(batch: int, vocab_size: int, sampling: SamplingParams) -> Scheduler:
    """A scheduler in the middle of decoding a batch."""
    limits = ModelLimits(vocab_size=vocab_size, max_context=4096, kv_capacity_tokens=batch * 4096, max_batch=batch)
    config = EngineConfig(max_sequences=batch, max_step_tokens=max(batch, 2048))
    scheduler = Scheduler(config, limits, BlockPool(batch * 256, config.block_size))
    for i in range(batch):
        stopping = StoppingCriteria(max_new_tokens=3900, ignore_eos=True)
        prompt = tuple((i + k) % vocab_size for k in range(128))
        scheduler.submit(Request(request_id=f"r{i}", token_ids=prompt, sampling=sampling, stopping=stopping))
    return scheduler


def step_times(scheduler: Scheduler, steps: int) -> dict[str, list[float]]:
    """Seconds of each part of `steps` decode steps."""
    times: dict[str, list[float]] = {"schedule": [], "wire": [], "commit": [], "all": []}
    for _ in range(20):
        _one(scheduler, times)
    for part in times.values():
        part.clear()
    for _ in range(steps):
        _one(scheduler, times)
    return times


def _one(scheduler: Scheduler, times: dict[str, list[float]]) -> None:
    clock = time.perf_counter
    start = clock()
    plan = scheduler.schedule()
    assert plan is not None, "the batch ended before the measurement"
    scheduled = clock()
    StepPlan.from_wire(msgpack.decode(msgpack.encode(("step", plan.wire())), type=tuple[str, Any])[1])
    sent = clock()
    scheduler.commit(plan, StepResult([1] * len(plan.sampled)))
    done = clock()
    for part, value in zip(times, (scheduled - start, sent - scheduled, done - sent, done - start), strict=True):
        times[part].append(value)


def draw_times(batch: int, vocab_size: int, sampling: SamplingParams, repeats: int = 50) -> list[float]:
    """Seconds to draw one token for every row of a batch."""
    scheduler = scheduler_with(batch, vocab_size, sampling)
    for _ in range(3):
        _one(scheduler, {"schedule": [], "wire": [], "commit": [], "all": []})
    logits = torch.randn(batch, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    sequences, sampler = list(scheduler.residents.running), Sampler(vocab_size)
    return _timed(lambda: sampler.draw(logits, sequences), repeats)


def _timed(call: Callable[[], object], repeats: int) -> list[float]:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def show(what: str, seconds: list[float]) -> None:
    micro = sorted(1e6 * value for value in seconds)
    print(f"{what:<24} {statistics.median(micro):9.1f} {micro[int(0.9 * len(micro))]:9.1f}")


def real_steps(options: argparse.Namespace) -> None:
    """Decode steps of a real model: what each spent outside the model's forward."""
    model = load(options.model, dtype=getattr(torch, options.dtype))
    context = 128 + options.steps + 8
    config = EngineConfig(
        kv_blocks=options.batch * -(-context // 16), max_sequences=options.batch, max_step_tokens=4096
    )
    for kind in ("greedy", "temperature"):
        engine = build_engine(build_runner(model, config, 0), config)
        for i in range(options.batch):
            stopping = StoppingCriteria(max_new_tokens=options.steps + 6, ignore_eos=True)
            prompt = tuple((i + 7 * k) % model.config.vocab_size for k in range(128))
            engine.submit(
                Request(request_id=f"r{i}", token_ids=prompt, sampling=KINDS[kind], stopping=stopping),
            )
        for _ in range(4):
            engine.step()
        loads = [engine.load()]
        for _ in range(options.steps):
            engine.step()
            loads.append(engine.load())
        forward = [b.forward_seconds - a.forward_seconds for a, b in pairwise(loads)]
        steps = [b.step_seconds - a.step_seconds for a, b in pairwise(loads)]
        rest = [whole - part for whole, part in zip(steps, forward, strict=True)]
        show(f"{kind}: forward", forward)
        show(f"{kind}: all else", rest)
        print(
            f"{kind}: all else is {100 * statistics.median(rest) / statistics.median(steps):.1f} % of a step (medians)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="engine overhead per decode step, in microseconds")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="a checkpoint; without one the model is a stub")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    native.set_threads(options.threads)
    print(f"batch {options.batch}\n{'microseconds per step':<24} {'median':>9} {'p90':>9}")
    if options.model is not None:
        real_steps(options)
        return
    for part, seconds in step_times(
        scheduler_with(options.batch, options.vocab, KINDS["greedy"]), options.steps
    ).items():
        show(part, seconds)
    for kind, sampling in KINDS.items():
        if kind != "greedy":
            show(f"draw: {kind}", draw_times(options.batch, options.vocab, sampling))


if __name__ == "__main__":
    main()
