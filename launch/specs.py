"""What the ranks of one replica are made of, from the command's settings: paths that mean the same on every rank, and a
key and a flight recorder of its own."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.actors.spec import FlightSpec, ServeSpec, TrainingConfig

if TYPE_CHECKING:
    from launch.serve import ServeConfig


def spec_of(config: ServeConfig, model: Path) -> ServeSpec:
    """What the ranks of one replica are made of."""
    return ServeSpec(
        model=str(model),
        task=config.task,
        mpt_reference=config.mpt_reference,
        adapter=None if config.adapter is None else str(Path(config.adapter).resolve()),
        authkey=secrets.token_bytes(32),
        parallel=replace(config.parallel, dp=1),  # a replica knows of no other
        engine=config.engine,
        training=_training(config.training),
        start_timeout_s=config.placement.start_timeout_s,
        weights_cache=config.placement.weights_cache,
        flight=FlightSpec(secrets.token_hex(4), _folder(config.observe.flight_dir)),
    )


def _folder(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())


def _training(config: TrainingConfig) -> TrainingConfig:
    """With the root as a path that means the same on every rank, whose working folders differ."""
    root = config.save_root
    return config if root is None else replace(config, save_root=str(Path(root).expanduser().resolve()))
