"""`tp-decoders train`: a run on a text, from a preset; the same command goes on where it was stopped or killed.

Reads the command line, has launch.training.resolve_train check it, and hands over to launch.training.run_training.
"""

from __future__ import annotations

import argparse
import os

from launch.observe import log_setup
from launch.presets import Layer, build, find, overrides, read
from launch.ray.private_ray import own_ray
from launch.ray.ray_config import ENVIRONMENT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="PRESET", required=True, help="a name from configs/training, or a path")
    parser.add_argument(
        "overrides", nargs="*", metavar="name.name=value", help="any setting, as in corpus.path=text.txt out=run"
    )
    log_setup.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    level = log_setup.configure(args.verbose, args.log_json)
    layers = [read(find(args.config, "training")), overrides(args.overrides)]
    if args.log_json:
        layers.append(Layer("command line", {"placement": {"log_json": True}}))
    for name, value in ENVIRONMENT.items():  # before Ray is imported, which reads some of them then
        os.environ.setdefault(name, value)
    from launch.training.resolve_train import resolve_train  # brings in torch
    from launch.training.train_config import TrainConfig

    config: TrainConfig = build(TrainConfig, layers)
    with own_ray(config.ray.address):
        resolved = resolve_train(config, level)
        from launch.training.run_training import train  # brings in Ray

        return train(resolved)
