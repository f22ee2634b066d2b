"""`tp-decoders init`: a checkpoint with random weights, of a shape given by a model preset.

For demonstrations, benchmarks and trials of a cluster before the real weights are there. The preset holds what a
Hugging Face config.json would.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.presets import find, read
from parallel.errors import ConfigError


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


def write_random(shape: Mapping[str, Any], output: Path, seed: int = 0, dtype: str = "float32") -> int:
    """Writes config.json and safetensors; returns the number of parameters."""
    import torch

    from tp_decoders import build, initialise, save
    from tp_decoders.registry import config_from_hf

    model = initialise(build(config_from_hf(dict(shape), unread="refuse"), dtype=getattr(torch, dtype)), seed)
    save(model, output)
    return sum(parameter.numel() for parameter in model.parameters())


def copy_tokenizer(source: Path, output: Path) -> None:
    """The tokenizer's files of one checkpoint, into another's folder."""
    from tp_decoders.files.companion_files import copy_files

    copy_files(found_tokenizer(source), output)


def found_tokenizer(folder: Path) -> dict[str, Path]:
    """The tokenizer's files of a folder, which must hold one."""
    from tp_decoders.files.companion_files import VOCABULARIES, tokenizer_files

    files = tokenizer_files(folder)
    if not any(name in files for name in VOCABULARIES):
        raise ConfigError(f"{folder} holds none of {list(VOCABULARIES)}; give a folder with a tokenizer")
    return files
