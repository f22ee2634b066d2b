"""How long streams pause when a rank is lost: kill -9 and SIGSTOP of rank 0 and of the last rank, over and over, under
six streams of the real server.

    python bench/healing.py --model FOLDER --tp 2 --rounds 3

Prints, for each kind of fault, median and maximum of: until the server knew (it says RECOVERING), and the longest time
a stream was without a token. Every stream must end with the tokens of an undisturbed run: one that does not is an
error. The model's context must hold `--tokens` tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.rpc.client.client import AsyncClient
from launch.commands.server_process import Server
from tp_decoders.protocol import control_pb2

STREAMS, BEFORE = 6, 60
RECOVERING = control_pb2.SERVING_STATE_RECOVERING


@dataclass
class Stream:
    """One stream's tokens, and its longest wait for the next of them."""

    tokens: list[int] = field(default_factory=list)
    pause: float = 0.0

    async def read(self, client: AsyncClient, index: int, count: int) -> None:
        last = time.monotonic()
        stopping = {"max_new_tokens": count, "ignore_eos": True}
        async for chunk in client.stream([[index, 3, 5]], sampling={"seed": index}, stopping=stopping):
            now = time.monotonic()
            self.pause, last = max(self.pause, now - last), now
            self.tokens += chunk.token_ids


def process_of(server: Server, rank: int) -> int:
    """The rank's present process, by what it said when it was ready."""
    return int(re.findall(rf"\(rank {rank} pid=(\d+)\)[^\n]* key/value cache", server.said)[-1])


async def until_known(client: AsyncClient) -> float:
    began = time.monotonic()
    while (await client.server_info()).state != RECOVERING:
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def one_fault(
    server: Server, client: AsyncClient, fault: signal.Signals, rank: int, count: int
) -> tuple[float, list[Stream]]:
    """After how long it was known, and the streams that lived through it."""
    streams = [Stream() for _ in range(STREAMS)]
    tasks = [asyncio.create_task(stream.read(client, i, count)) for i, stream in enumerate(streams)]
    while min(len(stream.tokens) for stream in streams) < BEFORE:
        await asyncio.sleep(0.005)
    os.kill(process_of(server, rank), fault)
    known = await until_known(client)
    await asyncio.gather(*tasks)
    print(f"{fault.name} of rank {rank}: known after {known:.2f} s, pause {max(s.pause for s in streams):.2f} s")
    return known, streams


async def measure(server: Server, args: argparse.Namespace) -> int:
    kinds = [(fault, rank) for fault in (signal.SIGKILL, signal.SIGSTOP) for rank in sorted({0, args.tp - 1})]
    wrong = 0
    async with AsyncClient(server.address) as client:
        quiet = [Stream() for _ in range(STREAMS)]
        await asyncio.gather(*(stream.read(client, i, args.tokens) for i, stream in enumerate(quiet)))
        for fault, rank in kinds:
            known, pauses = [], []
            for _ in range(args.rounds):
                after, streams = await one_fault(server, client, fault, rank, args.tokens)
                wrong += sum(s.tokens != q.tokens for s, q in zip(streams, quiet, strict=True))
                known.append(after)
                pauses.append(max(stream.pause for stream in streams))
            print(f"{fault.name} of rank {rank}, {args.rounds} x: known after {spread(known)}, pause {spread(pauses)}")
    print(f"streams that lost, doubled or changed a token: {wrong}")
    return 1 if wrong else 0


def spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} s (most {max(seconds):.1f} s)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1000)
    args = parser.parse_args()
    limits = ["placement.max_restarts=1000", "placement.restart_window_s=1"]
    with Server(["--model", args.model, "--tp", str(args.tp), *limits, "-v"]) as server:
        return asyncio.run(measure(server, args))


if __name__ == "__main__":
    sys.exit(main())
