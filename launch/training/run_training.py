"""What `train` does once its settings are read: claims the run's folder, starts the ranks on Ray, shows how far they
are, and draws the loss at the end.

A signal stops the run with a checkpoint; after a fault the ranks are started again from the last one. Takes no step
itself.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cluster.actors.group.placement import PlacementConfig, split_replicas
from cluster.actors.group.worker_group import WorkerGroup
from cluster.actors.host.load_progress import NUMBER_BYTES, over_budget
from cluster.actors.host.ray_session import ray_session
from cluster.actors.programs.serve_spec import MptReference
from cluster.actors.programs.train_program import TrainProgram
from cluster.actors.programs.train_spec import CorpusConfig, SampleConfig, TrainParallel
from cluster.training.checkpoint.checkpointer import latest_checkpoint, read_state
from cluster.training.data.batches.labelled_texts import LabelConfig, read_rows
from cluster.training.data.corpus.peek import peek
from cluster.training.data.corpus.sources import open_source
from cluster.training.job.loss_plot import can_plot, plot_loss
from cluster.training.job.run_folder import METRICS, PLOT, START, claim_folder, folder_origin
from cluster.training.job.run_metrics import check_tensorboard, read_records
from cluster.training.job.sample_text import Prompts
from cluster.training.job.skipped_batches import OnNonFinite, names_batch
from cluster.training.step.lr_schedule import Schedule
from cluster.training.step.optimizer import OptimizerConfig
from launch.observe.metrics_server import MetricsServer
from launch.paths import full_path
from launch.presets import Layer, build, find, read
from launch.ray.ray_config import RayConfig
from launch.serving.healing import Restarts
from launch.serving.resolve_serve import trained_dtype
from launch.training.first_weights import copy_tokenizer, write_random
from launch.training.run_progress import header, watch
from launch.training.train_metrics import TrainMetrics
from parallel.errors import ConfigError, WorkerError
from parallel.options import Recompute
from tp_decoders import build as build_model
from tp_decoders.adapters.lora import targeted
from tp_decoders.files.companion_files import VOCABULARIES
from tp_decoders.hub.repository import locate
from tp_decoders.hub.snapshot_cache import TOKENIZER
from tp_decoders.model.lora_config import LoraConfig
from tp_decoders.model.task_config import CAUSAL
from tp_decoders.registry import config_from_hf, read_config
from tp_decoders.text.tokenizer import load_tokenizer

LOOPBACK = "127.0.0.1"
LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What a start does not mend: a disk that is full or may not be written."""


@dataclass(frozen=True, kw_only=True)
class ScratchConfig:
    """Random weights to start from: a preset of configs/models, and a folder with a tokenizer."""

    preset: str | None = None  # of configs/models
    tokenizer: str | None = None  # a folder
    seed: int = 0  # of the weights


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything about one run; a preset holds any part of it. `model` is a checkpoint, a folder or a name of
    the hub, in place of scratch. What has the name of a field of TrainSpec is that field.
    """

    out: str  # the run's folder
    corpus: CorpusConfig
    schedule: Schedule
    steps: int
    task: str = CAUSAL
    mpt_reference: MptReference = "auto"
    labels: LabelConfig = field(default_factory=LabelConfig)
    save_every: int = 100
    keep: int = 2
    model: str | None = None  # a folder, or ORG/NAME[@revision] of the Hugging Face hub
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    micro_batch_tokens: int | None = None
    recompute: Recompute = "none"
    attention_backend: str | None = None
    dropout: bool = True
    lora: LoraConfig | None = None
    eval_every: int | None = None
    eval_batches: int = 8
    samples: SampleConfig = field(default_factory=SampleConfig)
    tensorboard: bool = False
    plot: bool = True  # the loss as a picture, at the end
    metrics_port: int | None = None  # of this command, for Prometheus on this machine
    peak_flops: float | None = None
    on_nonfinite: OnNonFinite = "stop"
    max_skipped_in_a_row: int = 3
    max_skipped: int = 20
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: TrainParallel = field(default_factory=TrainParallel)
    placement: PlacementConfig = field(default_factory=lambda: PlacementConfig(stop_timeout_s=120.0))
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass(frozen=True)
class _Origin:
    """Where the first weights are, which ones they are, how they get there, and what is known of them before."""

    model: Path
    identity: str
    shape: Mapping[str, Any]
    tokenizer: Path
    write: Callable[[], None]


def configuration(layers: Sequence[Layer]) -> TrainConfig:
    """Later layers win, key by key."""
    config = build(TrainConfig, layers)
    assert isinstance(config, TrainConfig), "build makes what it was asked for"
    return config


def prepare(config: TrainConfig) -> TrainProgram:
    """The run's specification, with its folder claimed and its first weights in place."""
    config.ray.check_room(1, config.parallel.world, config.parallel.device, config.placement.strategy)
    if config.metrics_port is not None and not 0 <= config.metrics_port < 65536:
        raise ConfigError(f"metrics_port is {config.metrics_port}; give 1 to 65535, or 0 for any free one")
    if config.tensorboard:
        check_tensorboard()
    out = full_path(config.out)
    origin = _from_scratch(config.scratch, out) if config.model is None else _from_folder(config.model, config)
    same = {f.name: getattr(config, f.name) for f in fields(TrainProgram) if hasattr(config, f.name)}
    if config.model is not None:
        same["parallel"] = replace(config.parallel, dtype=trained_dtype(origin.model, config.parallel.dtype))
    given = {
        "model": str(origin.model),
        "origin": origin.identity,
        "out": str(out),
        "corpus": replace(config.corpus, path=str(full_path(config.corpus.path))),
        "start_timeout_s": config.placement.start_timeout_s,
        "weights_cache": config.placement.weights_cache,
    }
    spec = TrainProgram(**same | given)
    _check_corpus(spec, config.corpus.path)
    _check_fit(spec, origin)
    claim_folder(out, spec.run())
    origin.write()
    return spec


def _check_corpus(spec: TrainProgram, given: str) -> None:
    """That it is there, as it was given, and can be read as the settings say; the whole of it is read by the ranks."""
    corpus = spec.corpus
    if not Path(corpus.path).exists():
        hint = "" if given.startswith(("/", "~")) else f": {given} is looked for below the current folder"
        raise ConfigError(f"corpus.path {corpus.path} does not exist{hint}; give a text or JSONL file, or a folder")
    try:
        if spec.task == CAUSAL:
            peek(open_source(corpus.path, corpus.source_options))
        else:
            read_rows(Path(corpus.path).read_bytes(), Path(corpus.path), spec.labels)
    except OSError as error:
        raise ConfigError(f"corpus.path {corpus.path} cannot be read: {error.strerror or error}") from error


def _from_folder(folder: str, config: TrainConfig) -> _Origin:
    model = full_path(locate(folder))
    shape = read_config(model, mpt_reference=config.mpt_reference).hf
    return _Origin(model, folder_origin(model), shape, model, lambda: None)


def _from_scratch(scratch: ScratchConfig, out: Path) -> _Origin:
    if scratch.preset is None or scratch.tokenizer is None:
        raise ConfigError("nothing to train: give model, a checkpoint folder, or scratch.preset and scratch.tokenizer")
    shape = dict(read(find(scratch.preset, "models")).values)
    config_from_hf(shape, unread="refuse")  # our own file
    tokenizer, start = locate(scratch.tokenizer, TOKENIZER), out / START

    def write() -> None:
        if start.is_dir():
            return
        draft = out / f".{START}.part"
        shutil.rmtree(draft, ignore_errors=True)
        write_random(shape, draft, seed=scratch.seed)
        copy_tokenizer(tokenizer, draft)
        os.replace(draft, start)

    identity = json.dumps({"shape": shape, "seed": scratch.seed}, sort_keys=True)
    return _Origin(start, identity, shape, tokenizer, write)


def _check_fit(spec: TrainProgram, origin: _Origin) -> None:
    """That text and model fit: rows and prompts into the context, tokens into the vocabulary, adapters to layers."""
    model = config_from_hf(dict(origin.shape), unread="ignore")
    tokenizer = load_tokenizer(origin.tokenizer)
    if tokenizer is None:
        raise ConfigError(f"{origin.tokenizer} has no tokenizer; it needs one of {list(VOCABULARIES)}")
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer in {origin.tokenizer} has {tokenizer.vocab_size} tokens, more than the model's vocabulary "
            f"of {model.vocab_size}; give the tokenizer that belongs to the model"
        )
    if spec.corpus.tokens_per_sample > model.max_positions:
        raise ConfigError(
            f"corpus.tokens_per_sample is {spec.corpus.tokens_per_sample}, more than the model's context of "
            f"{model.max_positions}; lower it"
        )
    Prompts(spec.samples.prompts, tokenizer, model.max_positions, spec.samples.max_tokens)
    if spec.lora is not None:
        targeted(build_model(model, device="meta"), spec.lora.targets)


def train(config: TrainConfig, spec: TrainProgram, log_level: int) -> int:
    """Runs the ranks until the last step, a signal or a fault; the exit status."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ray_session(config.ray.address, config.ray.cores(spec.parallel.world)):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        with metrics_of(config, spec):
            run_to_the_end(spec, replace(config.placement, log_level=log_level), stop)
    status = _last_words(spec)
    if config.plot:
        print(draw(Path(spec.out)), flush=True)
    return status


def run_to_the_end(spec: TrainProgram, placement: PlacementConfig, stop: threading.Event) -> None:
    """Lives of the run's ranks, one after another: a fault costs the steps since the last checkpoint and a start. Too
    many within a window, one at the first start, the same batch twice, or a disk that takes nothing more end the run
    with the cause.
    """
    restarts, started, blamed = Restarts(placement), False, None
    while True:
        try:
            for _ in one_life(spec, placement, stop):
                started = True
            return
        except WorkerError as fault:
            again = names_batch(str(fault)) is not None and names_batch(str(fault)) == blamed
            stays = again or any(os.strerror(number) in str(fault) for number in LASTING)
            delay = restarts.next_delay() if started and not stays else None
            if delay is None:
                raise
            blamed = names_batch(str(fault))
            print(f"{fault}; it does so by itself in {delay:g} s (restart {restarts.total})", flush=True)
            if stop.wait(delay):
                return


def one_life(spec: TrainProgram, placement: PlacementConfig, stop: threading.Event) -> Iterator[None]:
    """Starts the ranks, yields, and watches them until the end, a signal or a fault."""
    group = WorkerGroup(spec, spec.parallel.world, spec.parallel.device, placement)
    try:
        ready = group.start()
        yield
        for sentence in split_replicas([rank.place.node for rank in ready], spec.parallel.tp):
            print(f"note: {sentence}", flush=True)
        facts = ready[0].facts
        weights = facts.parameters * NUMBER_BYTES[facts.dtype] // spec.parallel.tp
        for line in facts.notes:
            print(f"note: {line}", flush=True)
        for line in (line for rank in ready for line in over_budget(rank.place, rank.seconds, weights)):
            print(f"note: {line}", flush=True)
        print(header(spec, facts), flush=True)
        watch(spec, facts.step, group.wait_fault, stop)
    finally:
        group.close()


@contextmanager
def metrics_of(config: TrainConfig, spec: TrainProgram) -> Iterator[None]:
    """The run's numbers for Prometheus, where that was asked for."""
    if config.metrics_port is None:
        yield
        return
    metrics = MetricsServer(TrainMetrics(Path(spec.out) / METRICS, spec.steps), LOOPBACK, config.metrics_port)
    print(f"metrics: {LOOPBACK}:{metrics.port}", flush=True)
    with closing(metrics):
        yield


def _last_words(spec: TrainProgram) -> int:
    newest = latest_checkpoint(Path(spec.out))
    if newest is None:
        raise WorkerError(f"stopped before the first checkpoint in {spec.out}; the same command starts again")
    step = read_state(newest).step
    more = "" if step >= spec.steps else f" of {spec.steps}; the same command goes on from there"
    print(f"step {step}{more}: {newest}", flush=True)
    return 0


def draw(out: Path) -> str:
    """Draws the run's loss; what to say of it."""
    if not can_plot():
        return "no loss plot: matplotlib is not installed; pip install 'tp-decoders[train]', or set plot=false"
    return f"loss plot: {plot_loss(read_records(out / METRICS), out / PLOT, out.name)}"
