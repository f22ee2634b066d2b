"""`tp-decoders init`: a checkpoint with random weights, of a shape given by a model preset.

For demonstrations, benchmarks and trials of a cluster before the real weights are there. The preset holds what a
Hugging Face config.json would.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.presets import find, read
from launch.training.first_weights import copy_tokenizer, write_random


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", help="a name from configs/models or a path to a .yaml file")
    parser.add_argument("output", type=Path, help="the folder to write; it must be empty or new")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--tokenizer", help="a folder, or ORG/NAME[@revision], whose tokenizer files are copied beside the weights"
    )


def run(args: argparse.Namespace) -> int:
    from tp_decoders.hub.repository import locate
    from tp_decoders.hub.snapshot_cache import TOKENIZER

    layer = read(find(args.preset, "models"))
    tokenizer = None if args.tokenizer is None else locate(args.tokenizer, TOKENIZER)
    count = write_random(layer.values, args.output, seed=args.seed, dtype=args.dtype)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, args.output)
    print(f"{args.output}: {layer.values['model_type']}, {count / 1e6:.1f} M random parameters, {args.dtype}")
    return 0
