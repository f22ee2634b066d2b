"""`tp-decoders drain`: a server takes no new calls, lets the open ones end within a time, and then ends by itself.

Only asks (Control.Drain) and waits. What its service manager sends (SIGTERM) does the same with server.drain_seconds.
"""

from __future__ import annotations

import argparse
import asyncio

from launch.client import client_flags, drain_time

ANSWER_S = 60.0
"""For the answer itself, beyond the grace time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    drain_time.add_arguments(parser, "how long what is open may take to end before it is ended")


def run(args: argparse.Namespace) -> int:
    drain_time.check(args)
    asyncio.run(drain(args))
    return 0


async def drain(args: argparse.Namespace) -> None:
    from cluster.rpc.client.client import AsyncClient

    async with AsyncClient(args.address, client_flags.access_of(args)) as client:
        await client.ready()
        aborted = await client.drain(args.grace, timeout=args.grace + ANSWER_S)
    requests = "1 request was" if aborted == 1 else f"{aborted} requests were"
    print(f"{args.address} takes nothing more and ends; {requests} ended after {args.grace:g} s")
