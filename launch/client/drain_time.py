"""What `drain` and `restart` have in common: whose server, and how long what is open there may take to end."""

from __future__ import annotations

import argparse

from launch.client import client_flags
from launch.client.generate import check_address
from parallel.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser, grace: str) -> None:
    """`grace` says what the seconds are for."""
    parser.add_argument("--address", default="127.0.0.1:50051", help="the server (default 127.0.0.1:50051)")
    parser.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help=f"{grace} (default 30)")
    client_flags.add_arguments(parser)


def check(args: argparse.Namespace) -> None:
    """Refuses an address or a time that is none."""
    check_address(args.address)
    if not 0 <= args.grace < float("inf"):
        raise ConfigError(f"--grace {args.grace:g}: give seconds from 0 on")
