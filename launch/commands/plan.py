"""`tp-decoders plan`: whether a model fits on a number of ranks, how it is best spread over them, and its preset.

Reads the command line; launch.commands.plan_report, which brings in torch, does the arithmetic and prints. Needs
neither weights nor the ranks.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from parallel.errors import ConfigError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True,
        help="a name from configs/models, a .yaml file, a folder with a config.json, or ORG/NAME[@revision]",
    )  # fmt: skip
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks in all; cores with --device cpu")
    parser.add_argument("--gpu-memory", required=True, metavar="SIZE", help="of each rank, as in 80GiB")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="ranks of one node (default 8)")
    parser.add_argument("--mode", choices=("full", "lora", "serve"), default="full", help="default: full fine-tuning")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--sequence", type=int, metavar="N", help="tokens of a sample (default: the model's context)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="samples of a step over all replicas (default 64)")
    parser.add_argument(
        "--micro-batch-tokens", type=int, metavar="N",
        help="tokens of one forward and backward (default: one sample); with --mode serve, of one step (default 1024)",
    )  # fmt: skip
    parser.add_argument("--streams", type=int, default=16, help="sequences served at once, with --mode serve")
    parser.add_argument("--lora-rank", type=int, default=16, help="with --mode lora (default 16)")
    parser.add_argument(
        "--lora-targets", default="all-linear", help="layers with an adapter, comma-separated (default all-linear)"
    )
    parser.add_argument("--show", type=int, default=6, metavar="N", help="how many layouts to list (default 6)")
    parser.add_argument("--out", type=Path, help="a new file for the best layout's preset (default: printed)")


def run(args: argparse.Namespace) -> int:
    memory = parse_memory(args.gpu_memory)
    from launch.commands.plan_report import answer, question_of  # brings in torch

    return answer(question_of(args, memory), args)


def parse_memory(text: str) -> int:
    """Bytes of '80GiB' (2^30) or '80GB' (10^9); '80G' is read as GiB, as GPUs are sold."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?(?:I?B)?)", text.strip().upper())
    unit = found[2] if found else None
    if unit in ("K", "M", "G", "T"):
        unit += "IB"
    if found is None or unit not in UNITS or float(found[1]) * UNITS[unit] < 1:
        raise ConfigError(f"--gpu-memory is {text!r}; write a number and a unit, as in 80GiB")
    return int(float(found[1]) * UNITS[unit])
