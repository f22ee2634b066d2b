"""What `train` does once its settings are read: claims the run's folder, starts the ranks on Ray and shows how far they
are from the metrics they write.

A signal stops the run with a checkpoint. Draws no plot and takes no step itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.actors.group import WorkerGroup
from cluster.actors.place import PlacementConfig
from cluster.actors.session import ray_session
from cluster.actors.spec import ParallelConfig
from cluster.actors.training import METRICS, CorpusConfig, TrainSpec, claim_folder, folder_origin, read_metrics
from cluster.training.checkpoint import latest_checkpoint, read_state
from cluster.training.optimizer import OptimizerConfig
from cluster.training.schedule import Schedule
from launch.init import copy_tokenizer, write_random
from launch.presets import Layer, build, find, read
from launch.serve import RayConfig
from parallel.errors import ConfigError, WorkerError
from tp_decoders.registry import read_config

POLL_S = 0.2
LINE_S = 5.0
"""Between lines of progress where the output is not a terminal."""


@dataclass(frozen=True, kw_only=True)
class ScratchConfig:
    """Random weights to start from: a preset of configs/models, and a folder with a tokenizer."""

    preset: str | None = None
    tokenizer: str | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything about one run; a preset holds any part of it. `model` is a checkpoint folder, in place of scratch."""

    out: str
    corpus: CorpusConfig
    schedule: Schedule
    steps: int
    save_every: int = 100
    keep: int = 2
    model: str | None = None
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    placement: PlacementConfig = field(default_factory=lambda: PlacementConfig(stop_timeout_s=120.0))
    ray: RayConfig = field(default_factory=RayConfig)


def configuration(layers: Sequence[Layer]) -> TrainConfig:
    """Later layers win, key by key."""
    config = build(TrainConfig, layers)
    assert isinstance(config, TrainConfig), "build makes what it was asked for"
    return config


def prepare(config: TrainConfig) -> TrainSpec:
    """The run's specification, with its folder claimed and its first weights in place."""
    if not Path(config.corpus.path).exists():
        raise ConfigError(f"corpus.path {config.corpus.path} does not exist; give a text or JSONL file, or a folder")
    out = Path(config.out).resolve()
    model, origin, write = _origin(config, out)
    spec = TrainSpec(
        model=str(model), origin=origin, out=str(out), steps=config.steps, save_every=config.save_every,
        keep=config.keep, schedule=config.schedule, optimizer=config.optimizer, parallel=config.parallel,
        corpus=replace(config.corpus, path=str(Path(config.corpus.path).resolve())),
        start_timeout_s=config.placement.start_timeout_s,
    )  # fmt: skip
    claim_folder(spec)
    write()
    read_config(model)
    return spec


def _origin(config: TrainConfig, out: Path) -> tuple[Path, str, Callable[[], None]]:
    """Where the first weights are, which ones they are, and how they get there."""
    scratch = config.scratch
    if config.model is not None:
        model = Path(config.model).resolve()
        read_config(model)
        return model, folder_origin(model), lambda: None
    if scratch.preset is None or scratch.tokenizer is None:
        raise ConfigError("nothing to train: give model, a checkpoint folder, or scratch.preset and scratch.tokenizer")
    shape = dict(read(find(scratch.preset, "models")).values)
    tokenizer, start = Path(scratch.tokenizer), out / "start"

    def write() -> None:
        if start.is_dir():
            return
        draft = out / ".start.part"
        shutil.rmtree(draft, ignore_errors=True)
        write_random(shape, draft, seed=scratch.seed)
        copy_tokenizer(tokenizer, draft)
        os.replace(draft, start)

    return start, json.dumps({"shape": shape, "seed": scratch.seed}, sort_keys=True), write


def train(config: TrainConfig, spec: TrainSpec, log_level: int) -> int:
    """Runs the ranks until the last step, a signal or a fault; the exit status."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ray_session(config.ray.address, config.ray.num_cpus):
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            placement = replace(config.placement, log_level=log_level)
            group = WorkerGroup(spec, spec.parallel.tp, spec.parallel.device, placement)
            try:
                facts = group.start()[0].facts
                print(
                    f"training {facts.family} ({facts.dtype}) on {facts.tokens} tokens, tp={spec.parallel.tp}, "
                    f"from step {facts.step} to {spec.steps}: {spec.out}", flush=True,
                )  # fmt: skip
                _watch(spec, group.wait_fault, stop)
            finally:
                group.close()
    except SystemExit as ended:  # Ray's own handler of SIGTERM, while Ray starts
        raise KeyboardInterrupt from ended
    return _last_words(spec)


def _watch(spec: TrainSpec, wait_fault: Callable[[float], str | None], stop: threading.Event) -> None:
    """Shows progress until the last checkpoint is complete or a signal came; a fault is raised."""
    shown = _Progress(spec.steps)
    while not stop.is_set():
        fault = wait_fault(POLL_S)
        if fault is not None:
            raise WorkerError(f"the run stopped: {fault}; the same command goes on from the last checkpoint")
        lines = read_metrics(Path(spec.out) / METRICS)
        done = _saved_step(spec) >= spec.steps
        if lines:
            shown(lines, last=done)
        if done:
            return


def _saved_step(spec: TrainSpec) -> int:
    newest = latest_checkpoint(Path(spec.out))
    return int(newest.name.removeprefix("step-")) if newest else 0


def _last_words(spec: TrainSpec) -> int:
    newest = latest_checkpoint(Path(spec.out))
    if newest is None:
        raise WorkerError(f"stopped before the first checkpoint in {spec.out}; the same command starts again")
    step = read_state(newest).step
    more = "" if step >= spec.steps else f" of {spec.steps}; the same command goes on from there"
    print(f"step {step}{more}: {newest}", flush=True)
    return 0


class _Progress:
    """One line: rewritten on a terminal, now and then a new one elsewhere."""

    def __init__(self, steps: int) -> None:
        self._steps, self._terminal = steps, sys.stdout.isatty()
        self._shown, self._when = 0, 0.0

    def __call__(self, lines: list[dict[str, float]], last: bool) -> None:
        step = int(lines[-1]["step"])
        due = self._terminal or last or time.monotonic() - self._when > LINE_S
        if due and (step > self._shown or (last and self._terminal)):
            ends = "\n" if last or not self._terminal else ""
            print(("\r" if self._terminal else "") + progress_line(lines, self._steps), end=ends, flush=True)
            self._shown, self._when = step, time.monotonic()


def progress_line(lines: list[dict[str, float]], steps: int) -> str:
    """How far a run is; speed and time left from its last ten steps."""
    recent = lines[-10:]
    seconds = sum(line["seconds"] for line in recent)
    step = int(lines[-1]["step"])
    minutes, left = divmod(round((steps - step) * seconds / len(recent)), 60)
    speed = sum(line["tokens"] for line in recent) / seconds
    return f"step {step}/{steps}  loss {lines[-1]['loss']:.4f}  {speed:.0f} tokens/s  ETA {minutes}:{left:02d}"
