"""`tp-decoders train`: a run on a text, from a preset; the same command goes on where it was stopped or killed.

Reads the command line and hands over to launch.training.run_training, which brings in torch and Ray.
"""

from __future__ import annotations

import argparse
import os

from launch.observe import log_setup
from launch.presets import Layer, find, overrides, read
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
    from launch.training.run_training import configuration, prepare, train

    config = configuration(layers)
    with own_ray(config.ray.address):
        return train(config, prepare(config), level)
