"""Everything about one run, as a preset and the command line say it; launch.training.resolve_train checks it."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.actors.group.placement import PlacementConfig
from cluster.actors.programs.train_spec import RunConfig
from launch.ray.ray_config import RayConfig


@dataclass(frozen=True, kw_only=True)
class ScratchConfig:
    """Random weights to start from: a preset of configs/models, and a folder with a tokenizer."""

    preset: str | None = None  # of configs/models
    tokenizer: str | None = None  # a folder
    seed: int = 0  # of the weights


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything about one run; a preset holds any part of it. `model` is a checkpoint, a folder or a name of
    the hub, in place of scratch.
    """

    model: str | None = None  # a folder, or ORG/NAME[@revision] of the Hugging Face hub
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    plot: bool = True  # the loss as a picture, at the end
    metrics_port: int | None = None  # of this command, for Prometheus on this machine
    placement: PlacementConfig = field(default_factory=lambda: PlacementConfig(stop_timeout_s=120.0))
    ray: RayConfig = field(default_factory=RayConfig)
