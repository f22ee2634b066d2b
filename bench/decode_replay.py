"""Decode steps of the same engine, replayed and computed call by call, in turns in one process.

    python bench/decode_replay.py --model DIR [--dtype bfloat16] [--batch 1 8] [--turns 6] [--steps 40] [--threads 2]
                                  [--tp 1] [--temperature 0]

Both engines share the weights and run the same sequences from a prompt of 128 tokens; with --tp each rank is a process
on a core of its own. Prints milliseconds of a whole engine step: for each batch the median over all steps of either
way, the fastest ones, the ratio of the medians of the turns, the share of steps that were replayed, and the mean
milliseconds of choosing the tokens.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from cluster.engine.engine import Engine
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, SamplingParams, StoppingCriteria
from cluster.engine.run.command_stream import STOP, Commands
from cluster.engine.run.executors import follow
from cluster.engine.schedule.step_plan import StepPlan, StepResult
from parallel.native.compiled import library as native
from parallel.ranks.mesh import init_groups
from tp_decoders import load
from tp_decoders.model.decoder import Decoder

PROMPT = 128
WARM = 8


@dataclass(frozen=True)
class Served:
    """What is decoded."""

    batch: int
    count: int  # steps that are timed
    temperature: float

    def config(self, replay: bool) -> EngineConfig:
        context = PROMPT + self.count + WARM + 8
        return EngineConfig(
            kv_blocks=self.batch * (-(-context // 16) + 1), max_sequences=self.batch, max_step_tokens=4096,
            replay=replay,
        )  # fmt: skip


class Either:
    """Two runners of one rank, one of which is in use: it replays, or it does not."""

    def __init__(self, model: Decoder, served: Served) -> None:
        self.model, self.now = model, False
        self.runners = {replay: build_runner(model, served.config(replay), 0) for replay in (False, True)}

    def use(self, replay: bool) -> None:
        self.now = replay

    def run(self, plan: StepPlan) -> StepResult | None:
        return self.runners[self.now].run(plan)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runners[self.now], name)


def engine_with(runner: Either, served: Served, replay: bool, commands: Commands | None) -> Engine:
    """In the middle of decoding."""
    use(runner, replay, commands)
    engine = build_engine(runner, served.config(replay), (), commands)  # type: ignore[arg-type]
    for i in range(served.batch):
        prompt = tuple((i + 7 * k) % runner.model.config.vocab_size for k in range(PROMPT))
        stopping = StoppingCriteria(max_new_tokens=served.count + WARM + 6, ignore_eos=True)
        drawn = served.temperature > 0
        sampling = SamplingParams(
            temperature=served.temperature, seed=i, top_k=50 if drawn else None, top_p=0.9 if drawn else None
        )
        engine.submit(Request(request_id=f"r{i}", token_ids=prompt, sampling=sampling, stopping=stopping))
    for _ in range(WARM):
        engine.step()
    return engine


def use(runner: Either, replay: bool, commands: Commands | None) -> None:
    """On every rank."""
    runner.use(replay)
    if commands is not None:
        commands.issue("use", replay)


def timed(engine: Engine, steps: int) -> list[float]:
    """Milliseconds of each step."""
    found = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        found.append(1e3 * (time.perf_counter() - began))
    return found


def compare(runner: Either, served: Served, turns: int, commands: Commands | None) -> str:
    engines = {replay: engine_with(runner, served, replay, commands) for replay in (False, True)}
    times: dict[bool, list[list[float]]] = {False: [], True: []}
    for _ in range(turns):
        for replay, engine in engines.items():
            use(runner, replay, commands)
            times[replay].append(timed(engine, served.count // turns))
    now = engines[True].load()
    ratio = statistics.median(
        statistics.median(a) / statistics.median(b) for a, b in zip(times[False], times[True], strict=True)
    )
    before, after = ([*chain(*times[replay])] for replay in (False, True))
    return (
        f"| {served.batch} | {statistics.median(before):.2f} | {statistics.median(after):.2f} | {min(before):.2f} | "
        f"{min(after):.2f} | {ratio:.2f} | {now.replayed_steps / now.steps:.0%} | "
        f"{1e3 * now.sample_seconds / now.steps:.2f} |"
    )


def rank(number: int, options: argparse.Namespace, address: str) -> None:
    """All of one rank's part."""
    native.configure(threads=options.threads)
    torch.set_num_threads(options.threads)
    if options.tp > 1:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number % len(os.sched_getaffinity(0))]})
    group = init_groups(number, options.tp, options.tp, 1, address if options.tp > 1 else None).tp
    model = load(options.model, group=group, dtype=getattr(torch, options.dtype))
    if number == 0:
        print(
            "| batch | computed, ms | replayed, ms | fastest computed | fastest replayed | ratio | steps replayed "
            "| choosing, ms |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
        )
    for batch in options.batch:
        served = Served(batch, options.turns * options.steps, options.temperature)
        runner, commands = Either(model, served), Commands(group.comm, 60.0) if options.tp > 1 else None
        if number == 0:
            print(compare(runner, served, options.turns, commands), flush=True)
            if commands is not None:
                commands.issue(STOP)
        elif commands is not None:
            follow(runner, commands, {"use": runner.use})  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, help="of a rank; 2, or with several ranks 1")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0, help="not 0: drawn, with top-k 50 and top-p 0.9")
    options = parser.parse_args()
    options.threads = options.threads or (2 if options.tp == 1 else 1)
    with tempfile.TemporaryDirectory() as folder:
        spawn = multiprocessing.get_context("spawn")
        ranks = [spawn.Process(target=rank, args=(i, options, f"file://{folder}/meet")) for i in range(options.tp)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()


if __name__ == "__main__":
    main()
