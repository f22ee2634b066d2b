"""The real command loses ranks while it streams: killed and frozen ones, the first and the last, with and without
trained weights, one stream under a grammar. Nobody loses, doubles or changes a token; health tells the truth; restarts
have an end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from cluster.rpc.client.client import AsyncClient, ServiceError
from launch.commands.server_process import Server
from parallel.native.compiled import library
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.frontend.harness import until
from tests.launch.serving.test_serve import processes_of, wait_until_gone
from tp_decoders.protocol.inference_pb2 import FinishReason

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
STREAMS, TOKENS, BEFORE = 6, 600, 100
GRAMMAR = {"regex": f"[a-f]{{{TOKENS + 1}}}"}
"""Of the first stream."""
LATE = ("DEADLINE_EXCEEDED", "FINISH_REASON_DEADLINE")
"""What a caller hears, by whether its own clock or the server's was first."""
NAMES = {value: name for name, value in health_pb2.HealthCheckResponse.ServingStatus.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library.available()  # compiled here if need be, outside the limits below
    folder = save_tiny("gpt_neox", tmp_path_factory.mktemp("neox") / "model", max_position_embeddings=2048)
    tokens = Tokenizer(BPE({"<end>": 0} | {chr(32 + i): i for i in range(1, 95)}, []))
    tokens.pre_tokenizer, tokens.decoder = ByteLevel(add_prefix_space=False), Bytes()
    tokens.save(str(folder / "tokenizer.json"))
    return folder


def server_of(model: Path, *more: str) -> Server:
    sizes = ["--preset", "small", "--cluster", "cpu-2", "engine.kv_blocks=512", "placement.silence_s=5"]
    sizes += ["parallel.collective_timeout_s=60"]
    return Server(["--model", str(model), *sizes, *more, "-v"])


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """Four faults are healed, the fifth ends it: the tests of this server run in their order."""
    running = server_of(model, "placement.max_restarts=4")
    running.__enter__()
    try:
        yield running
    finally:
        running.stop()


async def told(server: Server, words: str, count: int, seconds: float = 200.0) -> None:
    """Waits until the server has said so that often."""
    limit = time.monotonic() + seconds
    while server.said.count(words) < count:
        assert time.monotonic() < limit, server.said[-3000:]
        await asyncio.sleep(0.05)


def process_of(server: Server, rank: int, other_than: int | None = None) -> int:
    """The rank's newest process by what it said when it was ready, which comes by way of Ray's log, a moment later."""
    limit = time.monotonic() + 100
    while True:
        found = re.findall(rf"\(rank {rank} pid=(\d+)\)[^\n]* key/value cache", server.said)
        if found and int(found[-1]) != other_than:
            return int(found[-1])
        assert time.monotonic() < limit, server.said[-3000:]
        time.sleep(0.05)


class Streams:
    """Several streams read side by side; `count` is what the slowest one got."""

    def __init__(self, client: AsyncClient) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(STREAMS)]
        self.tasks = [asyncio.create_task(self._read(client, index)) for index in range(STREAMS)]

    async def _read(self, client: AsyncClient, index: int) -> None:
        stopping: dict[str, Any] = {"max_new_tokens": TOKENS, "ignore_eos": True}
        sampling: dict[str, Any] = {"seed": index}
        if index == 0:
            sampling, stopping = sampling | {"structured_outputs": GRAMMAR}, {"max_new_tokens": TOKENS}
        async for chunk in client.stream([[index, 3, 5]], sampling=sampling, stopping=stopping):
            self.tokens[index] += chunk.token_ids

    async def under_way(self) -> None:
        while min(map(len, self.tokens)) < BEFORE:
            await asyncio.sleep(0.005)

    async def all(self) -> list[list[int]]:
        await asyncio.gather(*self.tasks)
        return self.tokens


@asynccontextmanager
async def health_of(server: Server) -> AsyncIterator[list[str]]:
    """Every status that a watcher is told."""
    seen: list[str] = []
    async with grpc.aio.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())

        async def follow() -> None:
            async for answer in watch:
                seen.append(NAMES[answer.status])

        task = asyncio.create_task(follow())
        yield seen
        task.cancel()


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[list[int]]:
    async def main() -> list[list[int]]:
        async with AsyncClient(server.address) as client:
            return await Streams(client).all()

    tokens = asyncio.run(main())
    assert all(len(each) == TOKENS for each in tokens)
    assert len({*tokens[0]}) > 1 and {*tokens[0]} <= {ord(letter) - 32 for letter in "abcdef"}
    return tokens


@pytest.mark.parametrize(
    ("fault", "ranks", "number"),
    [(signal.SIGKILL, [1], 1), (signal.SIGKILL, [0], 2), (signal.SIGSTOP, [1], 3), (signal.SIGKILL, [0, 1], 4)],
)
def test_streams_end_with_the_tokens_of_an_undisturbed_run(
    server: Server, undisturbed: list[list[int]], fault: signal.Signals, ranks: list[int], number: int
) -> None:
    async def main() -> None:
        async with AsyncClient(server.address) as client, health_of(server) as health:
            streams = Streams(client)
            await streams.under_way()
            before = [process_of(server, rank) for rank in (0, 1)]
            for rank in ranks:
                os.kill(before[rank], fault)
            # another prompt at each fault: what was open at two deaths and never moved counts as their cause
            long = {"max_new_tokens": 1500}
            hurried = asyncio.create_task(client.generate([[1, number]], stopping=long, timeout=0.7))
            assert await streams.all() == undisturbed
            how = await ended_in_time(hurried)
            assert how in LATE or (fault == signal.SIGKILL and how == "FINISH_REASON_LENGTH")
            await told(server, "serving again", number)
            await until(lambda: len(health) > 2 and health[-1] == "SERVING")
            assert health == ["SERVING", "NOT_SERVING", "SERVING"]
            assert (await client.server_info()).fault == ""
            for rank in ranks:
                await asyncio.to_thread(process_of, server, rank, before[rank])
            assert [rank for rank in (0, 1) if process_of(server, rank) != before[rank]] == ranks

    asyncio.run(asyncio.wait_for(main(), 500))
    cause = "its process died" if fault == signal.SIGKILL else "its process gives no sign of life"
    assert re.search(rf"rank {ranks[0]} on [\d.]+: {cause}", server.said)


async def ended_in_time(call: asyncio.Task[Any]) -> str:
    """How a call with a deadline ended: it has its answer by then, whatever the group is busy with."""
    try:
        answer = await call
    except ServiceError as error:
        return error.code.name
    return FinishReason.Name(answer.results[0].samples[0].finish_reason)


def test_one_fault_too_many_ends_the_server_with_the_cause(server: Server) -> None:
    family = processes_of(server.pid)
    os.kill(process_of(server, 0), signal.SIGKILL)
    assert server.wait(200) == 1
    assert re.search(r"the engine is gone: rank 0 on \S+: its process died .*; 4 restarts within 600 s", server.said)
    assert wait_until_gone(family)


def test_trained_weights_come_back_as_they_were_saved_and_what_was_not_is_said_to_be_lost(
    model: Path, tmp_path: Path
) -> None:
    with server_of(model, "--train", "--save-root", str(tmp_path / "states")) as server:
        asyncio.run(asyncio.wait_for(train_and_lose(server), 500))
    assert "back at the state 'two', step 2: what was done to step 3 is lost" in server.said


async def train_and_lose(server: Server) -> None:
    async with AsyncClient(server.address) as client:
        rate: dict[str, Any] = {"optimizer": {"learning_rate": 1e-2}}
        for step in range(2):
            await client.train_step([[5, 9, 2, 7]], expected_step=step, **rate)
        await client.save_state("two")
        saved = await scores(client)
        await client.train_step([[5, 9]], expected_step=2, **rate)
        after_three = await scores(client)
        assert (await client.load_state("two", expected_step=3)).weight_version == 4
        undisturbed = await Streams(client).all()
        streams = Streams(client)
        await streams.under_way()
        os.kill(process_of(server, 1), signal.SIGKILL)
        assert await streams.all() == undisturbed, "the weights were those of the state"
        assert await scores(client) == saved
        state = await client.train_state()
        assert (state.step, state.weight_version) == (2, 4)
        with pytest.raises(ServiceError, match="give expected_step"):
            await client.train_step([[5, 9]], idempotency_key="new", **rate)
        assert (await client.train_step([[5, 9]], expected_step=2, **rate)).weight_version == 5
        assert await scores(client) == after_three, "the same step over again"

        os.kill(process_of(server, 0), signal.SIGKILL)
        await told(server, "serving again", 2)
        assert await scores(client) == saved
        with pytest.raises(ServiceError, match="what was done to step 3 is lost; ask GetTrainState"):
            await client.train_step([[5, 9]], expected_step=2, **rate)
        state = await client.train_state()
        assert (state.step, state.weight_version) == (2, 6), "other weights than those of version 5"
        assert (await client.train_step([[5, 9]], expected_step=2, **rate)).step == 3


async def scores(client: AsyncClient) -> list[list[float]]:
    return [list(result.logprobs) for result in (await client.score([[5, 9, 2, 7, 11]])).results]
