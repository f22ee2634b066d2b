"""What the ranks of one replica are made of, from the command's settings: paths that mean the same on every rank, a
type that can be trained, and a key and a flight recorder of its own."""

from __future__ import annotations

import logging
import secrets
from dataclasses import replace
from pathlib import Path

import torch

from cluster.actors.programs.serve_program import ServeProgram
from cluster.actors.programs.serve_spec import Dtype, FlightSpec, TrainingConfig
from launch.paths import full_path
from launch.serving.serve_config import ServeConfig
from parallel.errors import ConfigError
from tp_decoders.checkpoint.load_save import checkpoint_dtype

log = logging.getLogger(__name__)


def spec_of(config: ServeConfig, model: Path) -> ServeProgram:
    """What the ranks of one replica are made of."""
    return ServeProgram(
        model=str(model),
        task=config.task,
        mpt_reference=config.mpt_reference,
        adapter=None if config.adapter is None else str(full_path(config.adapter)),
        authkey=secrets.token_bytes(32),
        parallel=replace(config.parallel, dp=1),  # a replica knows of no other
        engine=config.engine,
        training=_training(config.training),
        start_timeout_s=config.placement.start_timeout_s,
        weights_cache=config.placement.weights_cache,
        flight=FlightSpec(secrets.token_hex(4), _folder(config.observe.flight_dir)),
    )


def trained_dtype(model: Path, given: Dtype | None) -> Dtype | None:
    """The type to train a checkpoint in: never float16, whose gradients underflow; a line says where that is new."""
    if given == "float16":
        raise ConfigError("parallel.dtype is 'float16', whose gradients underflow; train in 'bfloat16' or 'float32'")
    if given is not None or checkpoint_dtype(model) != torch.float16:
        return given
    log.warning(
        "%s is stored in float16, in which gradients underflow: it is trained in float32, which holds the same values; "
        "parallel.dtype=bfloat16 takes half the memory", model,
    )  # fmt: skip
    return "float32"


def _folder(path: str | None) -> str | None:
    return None if path is None else str(full_path(path))


def _training(config: TrainingConfig) -> TrainingConfig:
    """With the root as a path that means the same on every rank, whose working folders differ."""
    root = config.save_root
    return config if root is None else replace(config, save_root=str(full_path(root)))
