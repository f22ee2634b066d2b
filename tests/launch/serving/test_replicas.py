"""The real command with two replicas under load: the answers of one, exact streams while a replica is killed and while
both are restarted in turn, health that never falters, and a stop in the middle of a restart."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.engine.engine import generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, SamplingParams, StoppingCriteria
from cluster.rpc.client.client import AsyncClient, ServiceError
from launch.commands.server_process import Server
from launch.main import main
from parallel.native.compiled import library
from tests.cluster.engine.tiny_models import save_tiny
from tests.launch.serving.test_healing import health_of
from tests.launch.serving.test_serve import processes_of, wait_until_gone
from tp_decoders import load
from tp_decoders.protocol import control_pb2

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
PROMPTS = [[index, 3, 5] for index in range(6)]
TOKENS, LIMIT_S = 500, 280.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library.available()  # compiled here if need be, outside the limits below
    return save_tiny("gpt_neox", tmp_path_factory.mktemp("neox") / "model", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """What one engine, undisturbed and without a server, makes of the prompts."""
    config = EngineConfig(kv_blocks=512, max_sequences=8)
    engine = build_engine(build_runner(load(str(model)), config, 0), config)
    stopping = StoppingCriteria(max_new_tokens=TOKENS, ignore_eos=True)
    requests = [
        Request(request_id=str(seed), token_ids=tuple(prompt), sampling=SamplingParams(seed=seed), stopping=stopping)
        for seed, prompt in enumerate(PROMPTS)
    ]
    return [list(sample.token_ids) for (sample,) in generate(engine, requests)]


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """The tests of this server run in their order."""
    settings = ["engine.kv_blocks=512", "ray.num_cpus=2", "placement.silence_s=60"]
    running = Server(["--model", str(model), "--preset", "small", "--dp", "2", *settings, "-v"], timeout_s=LIMIT_S)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, but this one is told SIGHUP
    running.__enter__()
    signal.signal(signal.SIGHUP, before)
    try:
        yield running
    finally:
        running.stop()


class Load:
    """Streams and unary calls, one after the other on each of several lines; each answer is compared at its end."""

    def __init__(self, client: AsyncClient, expected: list[list[int]]) -> None:
        self._client, self._expected = client, expected
        self.answered = 0
        self.stopping = False
        self.tasks = [asyncio.create_task(self._line(line)) for line in range(5)]

    async def _line(self, line: int) -> None:
        dice = random.Random(line)
        for index in itertools.cycle(range(line, line + len(PROMPTS))):
            if self.stopping:
                return
            seed, count = index % len(PROMPTS), dice.randint(20, TOKENS)
            got = await (self._unary if line == 0 else self._stream)(seed, count)
            assert got == self._expected[seed][:count], f"line {line}, answer {self.answered}"
            self.answered += 1
            await asyncio.sleep(0.02)

    async def _stream(self, seed: int, count: int) -> list[int]:
        tokens: list[int] = []
        async for chunk in self._client.stream([PROMPTS[seed]], sampling={"seed": seed}, stopping=stop_at(count)):
            tokens += chunk.token_ids
        return tokens

    async def _unary(self, seed: int, count: int) -> list[int]:
        answer = await self._client.generate([PROMPTS[seed]], sampling={"seed": seed}, stopping=stop_at(count))
        return list(answer.results[0].samples[0].token_ids)

    async def more(self, count: int) -> None:
        """Until so many further answers were right; a wrong one is raised."""
        wanted = self.answered + count
        await until(lambda: self.answered >= wanted or any(task.done() for task in self.tasks))
        for task in self.tasks:
            if task.done():
                task.result()

    async def end(self) -> None:
        self.stopping = True
        await asyncio.gather(*self.tasks)


def stop_at(count: int) -> dict[str, object]:
    return {"max_new_tokens": count, "ignore_eos": True}


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def under_load(server: Server, expected: list[list[int]]) -> AsyncIterator[tuple[AsyncClient, Load]]:
    """All answers are right, and nobody who watches health is told of anything."""
    async with AsyncClient(server.address) as client, health_of(server) as health:
        load = Load(client, expected)
        await load.more(5)
        yield client, load
        await load.more(5)
        await load.end()
        assert health == ["SERVING"], server.said[-3000:]


async def replicas_of(client: AsyncClient) -> list[control_pb2.ReplicaInfo]:
    return list((await client.server_info()).replicas)


async def pids_of(client: AsyncClient) -> list[int]:
    """Of each replica's rank."""
    end = time.monotonic() + LIMIT_S
    while True:
        replicas = (await client.load()).replicas
        found = [rank.pid for replica in replicas for rank in replica.load.ranks]
        if len(found) == 2:
            return found
        assert time.monotonic() < end, replicas
        await asyncio.sleep(0.1)


def run(coroutine: object) -> None:
    asyncio.run(asyncio.wait_for(coroutine, LIMIT_S))  # type: ignore[arg-type]


def test_two_replicas_answer_as_one_and_prompts_go_where_their_beginning_is_known(
    server: Server, expected: list[list[int]]
) -> None:
    async def act() -> None:
        async with under_load(server, expected) as (client, load):
            await load.more(10)
        async with AsyncClient(server.address) as client:
            before = sum(replica.routed_by_prefix for replica in await replicas_of(client))
            for last in range(6):
                await client.generate([[7 + last % 2] * 64 + [last]], stopping=stop_at(4))
            assert sum(replica.routed_by_prefix for replica in await replicas_of(client)) == before + 4
            loads = [replica.load for replica in (await client.load()).replicas]
            assert [each.prefix_tokens_reused for each in loads] == [128, 128], "one kind each, found there twice"
            whole = await client.load()
            assert whole.generated_tokens == sum(each.generated_tokens for each in loads)
            assert min(each.generated_tokens for each in loads) > 0 and len(whole.ranks) == 2

    assert "tp=1 dp=2 on cpu" in server.ready
    cores = re.findall(r"launch.serving.run_server: rank 0 on \S+: .*? cores (\d+(?:,\d+)*)", server.said)
    assert len(cores) == 2 or len(os.sched_getaffinity(0)) < 2
    assert len(cores) < 2 or not set(cores[0].split(",")) & set(cores[1].split(",")), "no core is claimed twice"
    run(act())


def test_streams_go_on_exactly_where_a_replica_is_killed_and_it_comes_back(
    server: Server, expected: list[list[int]]
) -> None:
    async def act() -> None:
        async with under_load(server, expected) as (client, load):
            before = await pids_of(client)
            os.kill(before[1], signal.SIGKILL)
            await until(lambda: "engine fault: rank 0 on" in server.said)
            await load.more(10)
            while not all(replica.ready for replica in await replicas_of(client)):
                await load.more(1)
            assert [replica.restarts for replica in await replicas_of(client)] == [0, 1], server.said[-3000:]
            after = await pids_of(client)
            assert after[0] == before[0] and after[1] != before[1]
            generated = (await client.load()).replicas[1].load.generated_tokens
            while (await client.load()).replicas[1].load.generated_tokens == generated:
                await load.more(1)  # it takes new requests again

    run(act())
    assert re.search(r"\d+ prompts of replica 1 go on with the others", server.said)


def test_a_rolling_restart_under_load_fails_no_request_and_leaves_no_old_process(
    server: Server, expected: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    async def act() -> None:
        async with under_load(server, expected) as (client, load):
            before = await pids_of(client)
            command = ["restart", "--address", server.address, "--grace", "0.5"]
            restarting = asyncio.create_task(asyncio.to_thread(main, command))
            await until(lambda: "replica 0 is restarted" in server.said)
            with pytest.raises(ServiceError, match="FAILED_PRECONDITION: a restart is under way"):
                await client.call(client.control.Restart, control_pb2.RestartRequest())
            while not restarting.done():
                await load.more(1)
            assert restarting.result() == 0, server.said[-3000:]
            assert not set(before) & set(await pids_of(client))
            assert [replica.restarts for replica in await replicas_of(client)] == [1, 2]
            assert await asyncio.to_thread(wait_until_gone, set(before))

    run(act())
    assert re.search(r"2 replicas were restarted; \d+ requests? did not end within 0.5 s", capsys.readouterr().out)


def test_a_hang_up_restarts_too_and_a_stop_in_the_middle_of_it_ends_in_order(server: Server) -> None:
    family = processes_of(server.pid)
    started = server.said.count("replica 0 is restarted")
    os.kill(server.pid, signal.SIGHUP)
    end = time.monotonic() + LIMIT_S
    while server.said.count("replica 0 is restarted") == started:
        assert time.monotonic() < end, server.said[-3000:]
        time.sleep(0.02)
    assert server.stop() == 0, server.said[-3000:]
    assert wait_until_gone(family)
