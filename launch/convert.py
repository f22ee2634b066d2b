"""`tp-decoders convert`: a Hugging Face checkpoint in, safetensors out, in another type or shard size if wanted.

Reads what `serve` reads (`.bin` files too, through torch's weights-only loader) and writes what transformers loads.
Holds the whole model in memory once.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from parallel.errors import ConfigError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="the folder of a Hugging Face checkpoint")
    parser.add_argument("output", type=Path, help="the folder to write; it must be empty or new")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's own")
    parser.add_argument("--max-shard-size", default="5GB", help="of one file, as in 500MB (default 5GB)")


def run(args: argparse.Namespace) -> int:
    max_bytes = parse_size(args.max_shard_size)
    import torch

    from tp_decoders import load, save

    model = load(args.input, dtype=getattr(torch, args.dtype) if args.dtype else None)
    save(model, args.output, max_bytes)
    files = sorted(path.stat().st_size for path in args.output.glob("*.safetensors"))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    print(f"{args.output}: {model.config.model_type}, {dtype}, {sum(files) / 1e6:.1f} MB in {len(files)} file(s)")
    return 0


def parse_size(text: str) -> int:
    """Bytes of '500MB' and the like."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B?)", text.strip().upper())
    unit = found[2] if found else None
    if found is None or unit not in UNITS or float(found[1]) * UNITS[unit] < 1:
        raise ConfigError(f"--max-shard-size is {text!r}; write a number and a unit, as in 500MB or 5GB")
    return int(float(found[1]) * UNITS[unit])
