"""`tp-decoders init`: a checkpoint with random weights, of a shape given by a model preset.

For demonstrations, benchmarks and trials of a cluster before the real weights are there. The preset holds what a
Hugging Face config.json would; the initialisation is transformers' own.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.presets import find, read
from parallel.errors import ConfigError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "emoji.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", help="a name from configs/models or a path to a .yaml file")
    parser.add_argument("output", type=Path, help="the folder to write; it must be empty or new")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer files are copied beside the weights")


def run(args: argparse.Namespace) -> int:
    layer = read(find(args.preset, "models"))
    parameters = write_random(layer.values, args.output, where=layer.where, seed=args.seed, dtype=args.dtype)
    if args.tokenizer is not None:
        copy_tokenizer(args.tokenizer, args.output)
    print(f"{args.output}: {layer.values['model_type']}, {parameters / 1e6:.1f} M random parameters, {args.dtype}")
    return 0


def write_random(
    shape: Mapping[str, Any], output: Path, *, where: str = "model", seed: int = 0, dtype: str = "float32"
) -> int:
    """Writes config.json and safetensors; returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    new_folder(output)
    config = _hf_config(shape, where)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(output)
    return int(sum(parameter.numel() for parameter in model.parameters()))


def copy_tokenizer(source: Path, output: Path) -> None:
    """The tokenizer's files of one checkpoint, into another's folder."""
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not files:
        raise ConfigError(f"{source} holds none of {list(TOKENIZER_FILES)}; give a folder with a tokenizer")
    for file in files:
        shutil.copyfile(file, output / file.name)


def new_folder(output: Path) -> None:
    """Makes the folder; nothing that is there already is ever overwritten."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not an empty folder; choose a new one or empty it first")
    output.mkdir(parents=True, exist_ok=True)


def _hf_config(shape: Mapping[str, Any], where: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = dict(shape)
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"{where}.model_type is {model_type!r}; give a model type of transformers, as in gpt2 or gpt_neox"
        )
    known = CONFIG_MAPPING[model_type]().to_dict()
    unknown = sorted(name for name in values if name not in known)
    if unknown:
        raise ConfigError(f"{where}: unknown {unknown}; {model_type} accepts {sorted(known)}")
    return CONFIG_MAPPING[model_type](**values)
