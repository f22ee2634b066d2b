"""The door of `train`: a configuration is checked once, in one order, and becomes one frozen value that has for each
part of a run what that part needs. The run's folder is claimed then, and its first weights are in place.

All is checked here that needs only the configuration, the checkpoint's description, the corpus and this machine; the
whole of the corpus is read by the ranks. Imports no Ray.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cluster.actors.group.placement import PlacementConfig
from cluster.actors.programs.serve_spec import MptReference
from cluster.actors.programs.train_program import TrainProgram
from cluster.actors.programs.train_spec import RunConfig
from cluster.training.data.batches.labelled_texts import read_rows
from cluster.training.data.corpus.peek import peek
from cluster.training.data.corpus.sources import open_source
from cluster.training.job.run_folder import START, claim_folder, folder_origin
from cluster.training.job.run_metrics import check_tensorboard
from cluster.training.job.sample_text import Prompts
from launch.paths import full_path
from launch.presets import find, read
from launch.serving.resolve_serve import trained_dtype
from launch.training.first_weights import copy_tokenizer, write_random
from launch.training.train_config import ScratchConfig, TrainConfig
from parallel.errors import ConfigError
from tp_decoders import build as build_model
from tp_decoders.adapters.lora import targeted
from tp_decoders.files.companion_files import VOCABULARIES
from tp_decoders.hub.repository import locate
from tp_decoders.hub.snapshot_cache import TOKENIZER
from tp_decoders.model.task_config import CAUSAL
from tp_decoders.registry import config_from_hf, read_config
from tp_decoders.text.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class ResolvedTrain:
    """One run, by its parts. Paths are full, types and numbers those that are used."""

    program: TrainProgram  # of the ranks
    placement: PlacementConfig
    ray_address: str | None  # of a standing cluster
    cores: int | None  # of a cluster that is started here; None: what Ray finds
    metrics_port: int | None
    plot: bool


@dataclass(frozen=True)
class _Origin:
    """Where the first weights are, which ones they are, how they get there, and what is known of them before."""

    model: Path
    identity: str
    shape: Mapping[str, Any]
    tokenizer: Path
    write: Callable[[], None]


def resolve_train(config: TrainConfig, log_level: int) -> ResolvedTrain:
    """Checks all that can be checked before a rank starts; finds the first weights, or makes them."""
    parallel, placement = config.parallel, config.placement
    cores = config.ray.room(1, parallel.world, parallel.device, placement.strategy)
    if config.metrics_port is not None and not 0 <= config.metrics_port < 65536:
        raise ConfigError(f"metrics_port is {config.metrics_port}; give 1 to 65535, or 0 for any free one")
    if config.tensorboard:
        check_tensorboard()
    out = full_path(config.out)
    scratch = config.model is None
    origin = _from_scratch(config.scratch, out) if scratch else _from_folder(str(config.model), config.mpt_reference)
    program = _program(config, origin, out)
    _check_corpus(program, config.corpus.path)
    _check_fit(program, origin)
    claim_folder(out, program.run())
    origin.write()
    return ResolvedTrain(
        program=program,
        placement=replace(placement, log_level=log_level),
        ray_address=config.ray.address,
        cores=cores,
        metrics_port=config.metrics_port,
        plot=config.plot,
    )


def _program(config: TrainConfig, origin: _Origin, out: Path) -> TrainProgram:
    given: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(RunConfig)}
    given |= {"out": str(out), "corpus": replace(config.corpus, path=str(full_path(config.corpus.path)))}
    if config.model is not None:
        given |= {"parallel": replace(config.parallel, dtype=trained_dtype(origin.model, config.parallel.dtype))}
    ranks = config.placement
    return TrainProgram(
        model=str(origin.model), origin=origin.identity, start_timeout_s=ranks.start_timeout_s,
        weights_cache=ranks.weights_cache, **given,
    )  # fmt: skip


def _check_corpus(program: TrainProgram, given: str) -> None:
    """That it is there, as it was given, and can be read as the settings say; the whole of it is read by the ranks."""
    corpus = program.corpus
    if not Path(corpus.path).exists():
        hint = "" if given.startswith(("/", "~")) else f": {given} is looked for below the current folder"
        raise ConfigError(f"corpus.path {corpus.path} does not exist{hint}; give a text or JSONL file, or a folder")
    try:
        if program.task == CAUSAL:
            peek(open_source(corpus.path, corpus.source_options))
        else:
            read_rows(Path(corpus.path).read_bytes(), Path(corpus.path), program.labels)
    except OSError as error:
        raise ConfigError(f"corpus.path {corpus.path} cannot be read: {error.strerror or error}") from error


def _from_folder(folder: str, mpt_reference: MptReference) -> _Origin:
    model = full_path(locate(folder))
    shape = read_config(model, mpt_reference=mpt_reference).hf
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


def _check_fit(program: TrainProgram, origin: _Origin) -> None:
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
    if program.corpus.tokens_per_sample > model.max_positions:
        raise ConfigError(
            f"corpus.tokens_per_sample is {program.corpus.tokens_per_sample}, more than the model's context of "
            f"{model.max_positions}; lower it"
        )
    Prompts(program.samples.prompts, tokenizer, model.max_positions, program.samples.max_tokens)
    if program.lora is not None:
        targeted(build_model(model, device="meta"), program.lora.targets)
