"""`tp-decoders proto`: the protocol's files in a folder from which protoc, buf and grpcurl can read them."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import tp_decoders
from parallel.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder, made where it is missing")


def run(args: argparse.Namespace) -> int:
    for path in write(Path(args.out)):
        print(path)
    return 0


def write(out: Path) -> list[Path]:
    """The files below `out`, at the paths by which they import each other. Files of those names are replaced."""
    package = Path(tp_decoders.__file__).parent
    protocol, written = package / "protocol", []
    third_party = protocol / "third_party"
    for path in sorted(protocol.rglob("*.proto")):
        root = third_party if path.is_relative_to(third_party) else package.parent
        target = out / path.relative_to(root)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        except OSError as error:
            raise ConfigError(f"--out {out}: {error.strerror}; give a folder that can be written to") from error
        written.append(target)
    return written
