"""Decode steps of the same engine, replayed and computed call by call, in turns in one process.

    python bench/decode_replay.py --model DIR [--dtype bfloat16] [--batch 1 8] [--turns 6] [--steps 40] [--threads 2]

Both engines share the weights and run the same greedy sequences from a prompt of 128 tokens. Prints milliseconds of a
whole engine step: for each batch the median over all steps of either way, the fastest ones, and the ratio of the
medians of the turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import chain

import torch

from cluster.engine.engine import Engine
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, SamplingParams, StoppingCriteria
from parallel.native.compiled import library as native
from tp_decoders import load
from tp_decoders.model.decoder import Decoder

PROMPT = 128
WARM = 8


def engine_with(model: Decoder, batch: int, count: int, replay: bool) -> Engine:
    """In the middle of decoding."""
    context = PROMPT + count + WARM + 8
    config = EngineConfig(
        kv_blocks=batch * (-(-context // 16) + 1), max_sequences=batch, max_step_tokens=4096, replay=replay
    )
    engine = build_engine(build_runner(model, config, 0), config)
    for i in range(batch):
        prompt = tuple((i + 7 * k) % model.config.vocab_size for k in range(PROMPT))
        stopping = StoppingCriteria(max_new_tokens=count + WARM + 6, ignore_eos=True)
        greedy = SamplingParams(temperature=0.0)
        engine.submit(Request(request_id=f"r{i}", token_ids=prompt, sampling=greedy, stopping=stopping))
    for _ in range(WARM):
        engine.step()
    return engine


def timed(engine: Engine, steps: int) -> list[float]:
    """Milliseconds of each step."""
    found = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        found.append(1e3 * (time.perf_counter() - began))
    return found


def compare(model: Decoder, batch: int, turns: int, steps: int) -> str:
    engines = {replay: engine_with(model, batch, turns * steps, replay) for replay in (False, True)}
    times: dict[bool, list[list[float]]] = {False: [], True: []}
    for _ in range(turns):
        for replay, engine in engines.items():
            times[replay].append(timed(engine, steps))
    share = engines[True].load().replayed_steps / engines[True].load().steps
    ratio = statistics.median(
        statistics.median(a) / statistics.median(b) for a, b in zip(times[False], times[True], strict=True)
    )
    before, after = ([*chain(*times[replay])] for replay in (False, True))
    return (
        f"| {batch} | {statistics.median(before):.2f} | {statistics.median(after):.2f} | {min(before):.2f} | "
        f"{min(after):.2f} | {ratio:.2f} | {share:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    native.configure(threads=options.threads)
    torch.set_num_threads(options.threads)
    model = load(options.model, dtype=getattr(torch, options.dtype))
    print("| batch | computed, ms | replayed, ms | fastest computed | fastest replayed | ratio | steps replayed |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for batch in options.batch:
        print(compare(model, batch, options.turns, options.steps), flush=True)


if __name__ == "__main__":
    main()
