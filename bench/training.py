"""Training throughput side by side with transformers and torch's AdamW: same checkpoint, token ids, dtype and cores, in
one run.

    python bench/training.py --models DIR --model gpt2 --dtype float32 --engines tp2,hf

A step is forward, backward, clipping to norm 1 (ours; the other side runs without) and a fused AdamW update over 4
sequences of 256 tokens, dropout 0. tp2: two processes of one thread, pinned; hf: one process of two threads. bfloat16
is autocast over float32 weights there, bfloat16 weights with float32 masters here. Ranks keep freed memory, as `serve`
and `train` tell theirs to; `hf+` is transformers with the same setting. Engines take turns. Prints one JSON
line per engine (median, minimum and maximum rate, loss of the first and of the last step), then ratios. `--profile`
prints where a step of rank 0 spends its time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch
from serving import VOCAB, busy_elsewhere, make_models, prompts_of

SEQUENCES, LENGTH = 4, 256
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "attention_dropout")


class Stepper(Protocol):
    """Something that takes training steps."""

    def step(self) -> float: ...


class Ours:
    """One rank's trainer."""

    def __init__(self, path: Path, dtype: torch.dtype, rank: int, tp: int, port: int, threads: int) -> None:
        from cluster.actors.group.placement import Place
        from cluster.actors.host.cpu_affinity import claim_cores
        from cluster.training.step.optimizer import OptimizerConfig
        from cluster.training.step.train_batch import TrainBatch
        from cluster.training.step.trainer import Trainer, TrainerConfig
        from parallel.native.compiled.library import set_threads
        from parallel.ranks.mesh import Wiring, init_groups
        from tp_decoders.checkpoint.load_save import load

        if tp > 1:
            claim_cores(Place(rank=rank, world=tp, node="", local_rank=rank, local_size=tp), 1, "cpu")
        else:
            torch.set_num_threads(threads)
            set_threads(threads)
        groups = init_groups(rank, tp, tp, 1, f"tcp://127.0.0.1:{port}", wiring=Wiring(key=b"bench"))
        model = load(path, group=groups.tp, dtype=dtype)
        self.trainer = Trainer(model, groups, TrainerConfig(optimizer=OptimizerConfig(learning_rate=1e-4)))
        ids = torch.tensor(prompts_of([LENGTH] * SEQUENCES, VOCAB[path.name], 5))
        targets = torch.cat([ids[:, 1:], torch.full((SEQUENCES, 1), -100)], 1)
        self.batch = TrainBatch(
            token_ids=ids.flatten(), targets=targets.flatten(), weights=torch.ones(ids.numel()),
            lengths=(LENGTH,) * SEQUENCES, normaliser=float(SEQUENCES * (LENGTH - 1)),
        )  # fmt: skip

    def step(self) -> float:
        loss = self.trainer.forward_backward(self.batch).loss
        self.trainer.optim_step()
        return loss


class Transformers:
    """A plain training loop."""

    def __init__(self, path: Path, dtype: torch.dtype, threads: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(threads)
        config = AutoConfig.from_pretrained(path)
        for name in DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        config.use_cache = False
        kind = "eager" if path.name in ("mpt", "gpt_neox_japanese") else "sdpa"
        self.model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation=kind
        ).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.ids = torch.tensor(prompts_of([LENGTH] * SEQUENCES, VOCAB[path.name], 5))
        self.narrow = dtype is torch.bfloat16

    def step(self) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.narrow):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def work(
    pipe: Connection, name: str, path: Path, dtype: torch.dtype, rank: int, port: int, threads: int, profile: bool
) -> None:
    """A process: steps when told, None ends it."""
    stepper: Stepper = (
        Transformers(path, dtype, threads)
        if name.startswith("hf")
        else Ours(path, dtype, rank, int(name[2:]), port, threads)
    )
    pipe.send("ready")
    while pipe.recv() is not None:
        started = time.perf_counter()
        loss = stepper.step()
        pipe.send((time.perf_counter() - started, loss))
    if profile and rank == 0:
        import cProfile
        import pstats

        with cProfile.Profile() as profiler:
            stepper.step()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    elif profile:
        stepper.step()


class Engine:
    """An engine's processes, seen from the parent."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        set_allocator(name != "hf")
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        path, dtype = options.models / options.model, getattr(torch, options.dtype)
        self.pipes, self.processes = [], []
        for rank in range(1 if name.startswith("hf") else int(name[2:])):
            mine, theirs = context.Pipe()
            given = (theirs, name, path, dtype, rank, port, options.threads, options.profile)
            process = context.Process(target=work, args=given, daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)
        for pipe in self.pipes:
            assert pipe.poll(300) and pipe.recv() == "ready", f"{name} did not start"

    def step(self) -> tuple[float, float]:
        """(seconds, loss) of one step."""
        for pipe in self.pipes:
            pipe.send("step")
        for pipe in self.pipes:
            assert pipe.poll(600), f"{self.name} did not answer"
        answers: list[tuple[float, float]] = [pipe.recv() for pipe in self.pipes]
        return answers[0]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(60)
            process.kill()


def set_allocator(keeps: bool) -> None:
    """For processes that start from now on."""
    from launch.ray.ray_config import ENVIRONMENT

    for setting, value in ENVIRONMENT.items():
        if setting.startswith("MALLOC_"):
            os.environ.pop(setting, None)
            os.environ.update({setting: value} if keeps else {})


def measure(engines: list[Engine], options: argparse.Namespace) -> None:
    rates: dict[str, list[float]] = {engine.name: [] for engine in engines}
    losses: dict[str, list[float]] = {engine.name: [] for engine in engines}
    noise = 0.0
    for turn in range(options.runs + 1):
        for engine in engines:
            noise = max(noise, busy_elsewhere())
            seconds, loss = engine.step()
            losses[engine.name].append(round(loss, 4))
            if turn:  # the first round warms up
                rates[engine.name].append(SEQUENCES * LENGTH / seconds)
    for name, values in rates.items():
        row = {
            "model": options.model, "dtype": options.dtype, "engine": name, "unit": "tok/s",
            "median": round(statistics.median(values), 1), "min": round(min(values), 1),
            "max": round(max(values), 1), "n": len(values), "losses": [losses[name][0], losses[name][-1]],
            "cores_busy_between": round(noise, 2),
        }  # fmt: skip
        print(json.dumps(row), flush=True)
    first = statistics.median(rates[engines[0].name])
    for name, values in list(rates.items())[1:]:
        print(f"  {engines[0].name} / {name} = {first / statistics.median(values):.2f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--model", choices=sorted(VOCAB), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--engines", default="tp2,hf", help="comma-separated: tp1, tp2, ..., hf, hf+")
    parser.add_argument("--threads", type=int, default=2, help="threads of single-process engines")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--make", action="store_true", help="write missing checkpoints first")
    options = parser.parse_args()
    if options.make:
        make_models(options.models, [options.model])
    engines = [Engine(name, options) for name in options.engines.split(",")]
    try:
        measure(engines, options)
    finally:
        for engine in engines:
            engine.close()
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])
    sys.exit(main())
