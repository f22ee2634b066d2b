"""Many clients at once: none lost, none mixed up, everything freed, memory flat."""

from __future__ import annotations

import asyncio
import gc
import random
import resource
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cluster.rpc.client.client import AsyncClient
from tests.cluster.frontend.fakes import FakeEngine, tokens_of
from tests.cluster.frontend.harness import run, until
from tests.cluster.rpc.harness import Service, service

CLIENTS = 200
NEW_TOKENS = 40


async def read(s: Service, client: AsyncClient, seed: int, leave_after: int | None = None) -> dict[int, list[int]]:
    """One streaming client: the tokens of both samples, or what it had when it left."""
    got: dict[int, list[int]] = {0: [], 1: []}
    fields: dict[str, Any] = {"sampling": {"seed": seed, "n": 2}, "stopping": {"max_new_tokens": NEW_TOKENS}}
    chunks = client.stream([[seed % 13, 1]], **fields)
    count = 0
    async for chunk in chunks:
        got[chunk.sample_index].extend(chunk.token_ids)
        count += 1
        if count == leave_after:
            break
    await chunks.aclose()
    return got


def expected(seed: int) -> dict[int, list[int]]:
    return {index: tokens_of([seed % 13, 1], seed, index, NEW_TOKENS) for index in (0, 1)}


async def clients(s: Service) -> list[AsyncClient]:
    """Eight connections, so that not everything rides on one."""
    return [AsyncClient(s.address) for _ in range(8)]


def resident_kib() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 1024


async def stays_flat(one_round: Callable[[int], Awaitable[None]], kib: int, rounds: int = 8) -> None:
    """Rounds until one takes no more memory than this. Caches and buffers fill in the first ones, as they find room in
    what earlier tests left of the heap; what leaks goes on."""
    grown: list[int] = []
    for index in range(rounds):
        before = resident_kib()
        await one_round(index)
        grown.append(resident_kib() - before)
        if grown[-1] <= kib:
            return
    raise AssertionError(f"each of {rounds} rounds took more memory, in KiB: {grown}")


def test_200_concurrent_streaming_clients_all_complete_and_none_is_lost() -> None:
    async def main() -> None:
        async with service(FakeEngine(step_seconds=0.001, held=True)) as s:
            some = await clients(s)
            tasks = [asyncio.create_task(read(s, some[seed % 8], seed)) for seed in range(CLIENTS)]
            await until(lambda: s.frontend.num_open == CLIENTS)
            s.engine.held = False
            got = await asyncio.gather(*tasks)
            assert got == [expected(seed) for seed in range(CLIENTS)]
            await until(lambda: s.frontend.num_open == 0 and s.engine.idle)
            assert s.engine.submitted == CLIENTS
            await asyncio.gather(*(client.close() for client in some))

    run(main())


def test_half_of_200_clients_leave_at_random_and_everything_is_freed() -> None:
    async def main() -> None:
        rng = random.Random(3)
        async with service(FakeEngine(step_seconds=0.001)) as s:
            some = await clients(s)
            leaving = {seed: rng.randint(1, 20) for seed in rng.sample(range(CLIENTS), CLIENTS // 2)}
            got = await asyncio.gather(*(read(s, some[seed % 8], seed, leaving.get(seed)) for seed in range(CLIENTS)))
            for seed, tokens in enumerate(got):
                if seed in leaving:
                    assert all(tokens[i] == expected(seed)[i][: len(tokens[i])] for i in (0, 1))
                else:
                    assert tokens == expected(seed)
            await until(lambda: s.engine.idle and s.frontend.num_open == 0)
            load = await s.client.load()
            assert load.kv_blocks_free == load.kv_blocks_total and load.open_requests == 0
            await asyncio.gather(*(client.close() for client in some))

    run(main())


def test_memory_stays_flat_over_rounds_of_clients() -> None:
    async def main() -> None:
        async with service(FakeEngine(tokens_per_step=8)) as s:

            async def one_round(base: int) -> None:
                await asyncio.gather(*(read(s, s.client, base + i, 2 if i % 2 else None) for i in range(100)))
                await until(lambda: s.engine.idle)

            async def four(index: int) -> None:
                for part in range(4):
                    await one_round(400 * index + 100 * part)

            await stays_flat(four, 2048)  # KiB for 400 requests, half of them cancelled

    run(main())
