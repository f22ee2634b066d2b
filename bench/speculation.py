"""Decoding with speculation against decoding without: the same engine, prompts and seeds, in turns, in one process.

    python bench/speculation.py --model DIR [--make] [--dtype bfloat16] [--rounds 5]

`--make` trains a small GPT-NeoX over bytes until it copies (random runs that repeat, JSON records of one shape, a
line of text and its edit). Tasks, one request at a time, greedy unless stated:

    copy    a run of random letters, and the beginning of the same again
    json    records of the same keys; only values are new
    edit    lines of a play, and the same with a word changed throughout
    batch   eight copies at once: a full step brings no drafts
    hostile random letters, temperature 1: nothing repeats but by chance
    wrong   the same with a drafter that is always wrong, whenever it is asked

Prints tokens/s without and with (median of the rounds), their ratio as the median of rounds, drafted and accepted
tokens; fails where an answer differs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from cluster.engine.engine import Engine, generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig, SpeculationConfig
from cluster.engine.request import Request, SamplingParams, StoppingCriteria
from cluster.engine.run.model_runner import ModelRunner
from cluster.engine.sequences.sequence import Sequence
from parallel.native.compiled.library import set_threads
from tp_decoders import load

CONTEXT, NEW = 384, 80
PLAY = Path(__file__).resolve().parents[1] / "tests" / "data" / "text" / "tinyshakespeare.txt"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Wrong:
    """Never right."""

    def propose(self, seq: Sequence, most: int) -> list[int]:
        return [255] * most

    def ended(self, seq: Sequence) -> None:
        pass


def run_of(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(LETTERS, k=count))


def records(rng: random.Random, count: int) -> str:
    keys = [run_of(rng, rng.randint(3, 7)) for _ in range(3)]
    rows = ({key: run_of(rng, 3) for key in keys} for _ in range(count))
    return "".join(f"{row}\n" for row in rows)


def edit(rng: random.Random, play: str, length: int) -> tuple[str, str]:
    """A piece of text, and the same with every e in another letter's place."""
    start = rng.randrange(len(play) - length)
    before = play[start : start + length]
    return before, before.replace(" the ", " that ")


def document(rng: random.Random, play: str, length: int) -> str:
    kind, made = rng.random(), ""
    if kind < 0.6:
        made = (run_of(rng, rng.randint(6, length // 3)) + "|") * 40
    elif kind < 0.8:
        made = records(rng, length // 12)
    else:
        made = "|".join(edit(rng, play, length // 2))
    return made.ljust(length)[:length]


def prompt_of(task: str, rng: random.Random, play: str) -> str:
    if task in ("copy", "batch"):
        text = run_of(rng, 60)
        return f"{text}|{text[:8]}"
    if task == "json":
        return records(rng, 5)[:150]
    if task == "edit":
        before, after = edit(rng, play, 90)
        return f"{before}|{after[:12]}"
    return run_of(rng, 120)


def make(folder: Path, steps: int) -> None:
    """Trains and saves it; prints the loss."""
    import transformers as t

    config = t.GPTNeoXConfig(
        vocab_size=256, max_position_embeddings=CONTEXT, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=512, rotary_pct=1.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, rng, play = t.GPTNeoXForCausalLM(config).train(), random.Random(0), PLAY.read_text(encoding="utf-8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        length = 64 if step < steps * 0.7 else 192
        ids = [list(document(rng, play, length).encode("latin-1", "replace"))[:length] for _ in range(1152 // length)]
        batch = torch.tensor(ids)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)


def requests_of(task: str, play: str, numbers: Iterator[int]) -> list[Request]:
    rng, count = random.Random(task), 8 if task == "batch" else 1
    greedy = 1.0 if task in ("hostile", "wrong") else 0.0
    return [
        Request(
            request_id=str(next(numbers)), token_ids=tuple(prompt_of(task, rng, play).encode("latin-1", "replace")),
            sampling=SamplingParams(temperature=greedy, seed=1),
            stopping=StoppingCriteria(max_new_tokens=NEW, ignore_eos=True),
        )
        for _ in range(count)
    ]  # fmt: skip


def engine_of(runner: ModelRunner, config: EngineConfig, task: str) -> Engine:
    engine = build_engine(runner, config)
    if task == "wrong" and engine.scheduler.speculator.drafter is not None:
        engine.scheduler.speculator.drafter = Wrong()
    return engine


def measure(model: torch.nn.Module, task: str, rounds: int) -> str:
    """One row of the table."""
    play, numbers = PLAY.read_text(encoding="utf-8"), iter(range(1 << 30))
    configs = [
        EngineConfig(kv_blocks=256, prefix_caching=False, speculation=SpeculationConfig(method=method, recent_tokens=0))
        for method in ("off", "ngram")
    ]
    engines = [engine_of(build_runner(model, config, 0), config, task) for config in configs]  # type: ignore[arg-type]
    rates: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        answers = []
        for place in (0, 1) if turn % 2 else (1, 0):
            requests = requests_of(task, play, numbers)
            began = time.perf_counter()
            answers.append(generate(engines[place], requests))
            rates[place] += [NEW * len(requests) / (time.perf_counter() - began)] if turn else []
        if answers[0] != answers[1]:
            raise SystemExit(f"{task}: an answer differs with speculation")
    ratio = statistics.median(fast / slow for slow, fast in zip(*rates, strict=True))
    counted = engines[1].load()
    without, given = (f"{statistics.median(rate):.0f} ({min(rate):.0f}-{max(rate):.0f})" for rate in rates)
    return f"| {task} | {without} | {given} | {ratio:.2f} | {counted.draft_tokens} | {counted.accepted_draft_tokens} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", default=["copy", "json", "edit", "batch", "hostile", "wrong"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.make:
        make(options.model, options.steps)
    set_threads(options.threads)
    model = load(str(options.model), dtype=getattr(torch, options.dtype))
    print("| task | tokens/s without | with | ratio | drafted | accepted |\n| --- | --- | --- | --- | --- | --- |")
    for task in options.tasks:
        print(measure(model, task, options.rounds), flush=True)


if __name__ == "__main__":
    main()
