"""`tp-decoders drain`: a server takes no new calls, lets the open ones end within a time, and then ends by itself.

Only asks (Control.Drain) and waits. What its service manager sends (SIGTERM) does the same with server.drain_seconds.
"""

from __future__ import annotations

import argparse
import asyncio

from launch import access
from launch.generate import check_address
from parallel.errors import ConfigError

ANSWER_S = 60.0
"""For the answer itself, beyond the grace time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default="127.0.0.1:50051", help="the server (default 127.0.0.1:50051)")
    parser.add_argument(
        "--grace", type=float, default=30.0, metavar="SECONDS",
        help="how long what is open may take to end before it is ended (default 30)",
    )  # fmt: skip
    access.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    check_address(args.address)
    if not 0 <= args.grace < float("inf"):
        raise ConfigError(f"--grace {args.grace:g}: give seconds from 0 on")
    asyncio.run(drain(args))
    return 0


async def drain(args: argparse.Namespace) -> None:
    from cluster.rpc.client import AsyncClient

    async with AsyncClient(args.address, access.access_of(args)) as client:
        await client.ready()
        aborted = await client.drain(args.grace, timeout=args.grace + ANSWER_S)
    requests = "1 request was" if aborted == 1 else f"{aborted} requests were"
    print(f"{args.address} takes nothing more and ends; {requests} ended after {args.grace:g} s")
