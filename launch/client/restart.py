"""`tp-decoders restart`: a server's ranks end and start anew, one replica after the other, while the others serve.

Only asks (Control.Restart) and waits; the server does it, and goes on where this command is interrupted.
"""

from __future__ import annotations

import argparse
import asyncio

from launch.client import client_flags, drain_time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    drain_time.add_arguments(parser, "how long what is open on a replica may take to end before others take it over")


def run(args: argparse.Namespace) -> int:
    drain_time.check(args)
    asyncio.run(restart(args))
    return 0


async def restart(args: argparse.Namespace) -> None:
    """Until every replica has proved that it works again."""
    from cluster.rpc.client.client import AsyncClient
    from tp_decoders.protocol.control_pb2 import RestartRequest

    async with AsyncClient(args.address, client_flags.access_of(args)) as client:
        await client.ready()
        done = await client.call(client.control.Restart, RestartRequest(grace_seconds=args.grace))
    replicas = "1 replica was" if done.replicas == 1 else f"{done.replicas} replicas were"
    requests = "1 request" if done.handed_over == 1 else f"{done.handed_over} requests"
    print(f"{replicas} restarted; {requests} did not end within {args.grace:g} s and went on elsewhere")
