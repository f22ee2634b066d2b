"""`tp-decoders bench serve`: concurrent streams against a running server: first token, between tokens, throughput.

Prompts are random token ids, greedy and without an end, so that every stream has the length asked for. What is
measured is what a client sees, this process's own work included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.safe_text import for_terminal
from launch.client import client_flags
from launch.client.generate import check_address
from launch.client.latency import StreamTimes, summarise, table
from parallel.errors import ConfigError, WorkerError

if TYPE_CHECKING:
    from cluster.rpc.client.client import AsyncClient


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["serve"], help="what to measure: a running server")
    parser.add_argument("--address", default="127.0.0.1:50051", help="the server (default 127.0.0.1:50051)")
    parser.add_argument("--streams", type=int, default=16, help="open at the same time (default 16)")
    parser.add_argument("--requests", type=int, help="in all (default: two per stream)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="per request (default 64)")
    parser.add_argument("--new-tokens", type=int, default=64, help="per request (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    client_flags.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    check_address(args.address)
    for name in ("streams", "requests", "prompt_tokens", "new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1")
    streams = asyncio.run(_measure(args))
    summary = summarise(streams)
    print(for_terminal(table(summary)))
    if args.json is not None:
        workload = {name: getattr(args, name) for name in ("streams", "prompt_tokens", "new_tokens", "seed")}
        args.json.write_text(json.dumps({"workload": workload, **summary.as_dict()}, indent=2) + "\n", encoding="utf-8")
    if summary.failed == summary.streams:
        raise WorkerError(f"{args.address}: every stream failed")
    return 0


async def _measure(args: argparse.Namespace) -> list[StreamTimes]:
    from cluster.rpc.client.client import AsyncClient, ServiceError

    async with AsyncClient(args.address, client_flags.access_of(args), retry_seconds=0) as client:
        try:
            info = await client.model_info(timeout=10.0)
        except ServiceError as error:
            raise WorkerError(f"{args.address}: {error}") from error
        if args.prompt_tokens + args.new_tokens - 1 > info.max_context:
            raise ConfigError(
                f"--prompt-tokens {args.prompt_tokens} + --new-tokens {args.new_tokens} do not fit the context of "
                f"{info.max_context} tokens; give smaller numbers"
            )
        draw = random.Random(args.seed)
        count = args.requests or 2 * args.streams
        prompts = [[draw.randrange(info.vocab_size) for _ in range(args.prompt_tokens)] for _ in range(count)]
        await _one(client, prompts[0], args.new_tokens)  # warm-up
        waiting = iter(prompts)

        async def worker() -> list[StreamTimes]:
            return [await _one(client, prompt, args.new_tokens) for prompt in waiting]

        done = await asyncio.gather(*(worker() for _ in range(min(args.streams, count))))
        return [times for worker_times in done for times in worker_times]


async def _one(client: AsyncClient, prompt: list[int], new_tokens: int) -> StreamTimes:
    from cluster.rpc.client.client import ServiceError

    chunks: list[tuple[float, int]] = []
    sent = time.perf_counter()
    stopping = {"max_new_tokens": new_tokens, "ignore_eos": True}
    try:
        async for chunk in client.stream([prompt], sampling={"temperature": 0.0}, stopping=stopping):
            if chunk.token_ids:
                chunks.append((time.perf_counter(), len(chunk.token_ids)))
    except ServiceError as error:
        return StreamTimes(sent, tuple(chunks), len(prompt), str(error))
    return StreamTimes(sent, tuple(chunks), len(prompt), None if chunks else "no token came")
