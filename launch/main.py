"""The command line: `tp-decoders COMMAND ...` (or `python -m launch COMMAND ...`).

Only names and one-line descriptions live here; a command's module is imported when it is chosen, so that --help is
quick. Every expected error becomes one line: exit status 2 for bad input, 1 for a failure, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper

from cluster.safe_text import visible
from parallel.errors import CheckpointError, ConfigError, RequestError, TpError
from parallel.private_folder import no_file_for_everybody
from tp_decoders.access.errors import ClientError, SettingsError


@dataclass(frozen=True)
class Command:
    """A sub-command: the module that has `add_arguments(parser)` and `run(args) -> int`."""

    module: str
    help: str
    example: str


COMMANDS = {
    "serve": Command(
        "launch.commands.serve", "serve a checkpoint over gRPC", "tp-decoders serve --model ./gpt2 --tp 2"
    ),
    "generate": Command(
        "launch.client.generate",
        "stream a server's continuation of a prompt to the terminal",
        'tp-decoders generate "Once upon a time" --address localhost:50051 --max-new-tokens 40',
    ),
    "convert": Command(
        "launch.commands.convert",
        "rewrite a checkpoint as safetensors, in another type or shard size, or from another format",
        "tp-decoders convert ./gpt-neox-20b ./gpt-neox-20b-bf16 --dtype bfloat16 --max-shard-size 5GB",
    ),
    "init": Command(
        "launch.commands.init",
        "write a checkpoint with random weights from a model preset, for trials",
        "tp-decoders init tiny-gpt2 ./tiny --seed 0",
    ),
    "bench": Command(
        "launch.client.bench",
        "measure a running server: latency and throughput of concurrent streams",
        "tp-decoders bench serve --address localhost:50051 --streams 16 --new-tokens 64",
    ),
    "train": Command(
        "launch.commands.train",
        "train a checkpoint on a text, or go on with a run",
        "tp-decoders train --config laptop corpus.path=text.txt out=run",
    ),
    "plan": Command(
        "launch.commands.plan",
        "say whether a model fits on a number of ranks, and how it is best spread over them",
        "tp-decoders plan --model gpt-neox-20b --gpus 16 --gpu-memory 80GiB",
    ),
    "token": Command(
        "launch.commands.token",
        "make a token for a client and add its digest to a server's token file",
        "tp-decoders token alice --roles generate --add-to tokens.toml",
    ),
    "preflight": Command(
        "launch.commands.preflight",
        "compare a cluster's nodes and measure the links between them, and name the odd one out",
        "tp-decoders preflight --ranks 16 --device cuda --model /shared/weights/gpt-neox-20b",
    ),
    "status": Command(
        "launch.client.status",
        "show what a server does: health, requests, memory, ranks; --watch keeps showing it",
        "tp-decoders status --address localhost:50051 --watch",
    ),
    "drain": Command(
        "launch.client.drain",
        "let a server take nothing more, finish what is open, and end",
        "tp-decoders drain --address localhost:50051 --grace 60",
    ),
    "restart": Command(
        "launch.client.restart",
        "start a server's ranks anew, one replica after the other, without losing a request",
        "tp-decoders restart --address localhost:50051 --grace 30",
    ),
    "flight": Command(
        "launch.commands.flight",
        "read what the ranks' flight recorders left after a fault: which rank fell out of step, in which command",
        "tp-decoders flight /tmp/tp-decoders-flight-1000",
    ),
    "proto": Command(
        "launch.client.proto",
        "write the protocol's .proto files, and those of google.rpc that they import, for clients in other languages",
        "tp-decoders proto --out protos",
    ),
    "demo": Command(
        "launch.commands.demo",
        "train a small model on two CPU ranks, serve it and show it; a few minutes",
        "tp-decoders demo",
    ),
}
BAD_INPUT = (ConfigError, CheckpointError, RequestError, SettingsError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    no_file_for_everybody()
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal that has not every character is shown the others' numbers
        sys.stdout.reconfigure(errors="backslashreplace")
    chosen = next((word for word in given if not word.startswith("-")), None)
    try:
        args = _arguments(parser_of(chosen), given)
        _check_here()
        return int(import_module(COMMANDS[args.command].module).run(args))
    except (TpError, ClientError) as error:
        print(visible(f"tp-decoders {chosen}: {error}"), file=sys.stderr)
        return 2 if isinstance(error, BAD_INPUT) else 1
    except BrokenPipeError:  # the reader of our output has gone: nothing more to say, and nowhere to say it
        sys.stdout = None  # type: ignore[assignment]
        return 1
    except OSError as error:  # of the surroundings: a disk that is full, a file that may not be read
        where = f"{error.filename}: " if error.filename is not None else ""
        print(visible(f"tp-decoders {chosen}: {where}{error.strerror or error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _check_here() -> None:
    """In a folder that was removed no library of ours can be loaded, and no path looked up."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the current folder does not exist any more; change to one that does") from error


def _arguments(parser: argparse.ArgumentParser, given: Sequence[str]) -> argparse.Namespace:
    """Parsed; overrides may stand anywhere among the options, which argparse by itself takes in one place only."""
    args, left = parser.parse_known_args(given)
    overrides = getattr(args, "overrides", None)
    foreign = [word for word in left if overrides is None or word.startswith("-") or "=" not in word]
    if foreign:
        parser.error(f"unrecognized arguments: {' '.join(foreign)}; see tp-decoders {args.command} --help")
    if overrides is not None:
        args.overrides = [*overrides, *left]
    return args


def parser_of(chosen: str | None) -> argparse.ArgumentParser:
    """All commands by name, the chosen one with its arguments."""
    parser = argparse.ArgumentParser(
        prog="tp-decoders",
        description="Tensor-parallel serving and training of GPT-2, GPT-NeoX, GPT-NeoX-Japanese, MPT and GPT-BigCode "
        "checkpoints.",
        epilog="example: tp-decoders serve --model ./gpt2 --tp 2",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=f"example: {command.example}",
        )
        if name == chosen:
            import_module(command.module).add_arguments(sub)
    return parser


def _version() -> str:
    try:
        return f"tp-decoders {version('tp-decoders')}"
    except PackageNotFoundError:
        return "tp-decoders (not installed)"


if __name__ == "__main__":
    sys.exit(main())
