"""A client whose server dies under it: the next one at its port is asked again, and no token is lost or doubled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from cluster.frontend.frontend import Frontend
from cluster.frontend.requests.call import FrontendConfig
from cluster.link.local_link import LocalLink
from cluster.rpc.client.client import AsyncClient, ServiceError
from cluster.rpc.server import build_server
from tests.cluster.frontend.fakes import CODEC, FakeEngine, tokens_of
from tests.cluster.frontend.harness import run
from tp_decoders.client.transport.retries import Continued
from tp_decoders.protocol import inference_pb2 as pb

LENGTH = {"max_new_tokens": 60}


class Place:
    """One port, at which one server after another answers."""

    def __init__(self) -> None:
        self.port = 0
        self.stop: Any = None

    async def serve(self, step_seconds: float = 0.02) -> None:
        frontend = Frontend(LocalLink(FakeEngine(step_seconds=step_seconds)), codec=CODEC, config=FrontendConfig())
        frontend.start()
        server = build_server(frontend, f"127.0.0.1:{self.port}")
        await server.start()
        self.port = server.port

        async def stop() -> None:
            await server.stop(0)
            await frontend.close()

        self.stop = stop


@asynccontextmanager
async def place(**client: Any) -> AsyncIterator[tuple[Place, AsyncClient]]:
    where = Place()
    await where.serve()
    async with AsyncClient(f"127.0.0.1:{where.port}", **client) as made:
        await made.ready(30)
        yield where, made
    await where.stop()


class Reader:
    """A stream read in a task."""

    def __init__(self, client: AsyncClient, *prompts: Any, **fields: Any) -> None:
        self.chunks: list[pb.GenerateChunk] = []
        self.task = asyncio.create_task(self._read(client, prompts, fields))

    async def _read(self, client: AsyncClient, prompts: Any, fields: Any) -> None:
        async for chunk in client.stream(list(prompts), **{"stopping": LENGTH, **fields}):
            self.chunks.append(chunk)

    async def has(self, count: int) -> None:
        while sum(len(chunk.token_ids) for chunk in self.chunks) < count:
            assert not self.task.done()
            await asyncio.sleep(0.002)

    def of(self, prompt: int = 0, sample: int = 0) -> tuple[list[int], str, list[float]]:
        mine = [c for c in self.chunks if (c.prompt_index, c.sample_index) == (prompt, sample)]
        tokens = [token for c in mine for token in c.token_ids]
        return tokens, "".join(c.text for c in mine), [value for c in mine for value in c.logprobs]


def test_a_seeded_stream_goes_on_at_the_next_server_without_a_lost_or_doubled_token() -> None:
    async def main() -> None:
        async with place() as (where, client):
            fields: dict[str, Any] = {"sampling": {"seed": 4, "n": 2}, "response": {"logprobs": 0, "token_bytes": True}}
            reader = Reader(client, [1, 2], "ab é", **fields)
            for count in (30, 120):
                await reader.has(count)
                await where.stop()
                await asyncio.sleep(0.05)
                await where.serve()
            await reader.task
            prompts = [[1, 2], CODEC.tokenizer.encode("ab é")]
            for prompt, sample in ((0, 0), (0, 1), (1, 0), (1, 1)):
                tokens, text, logprobs = reader.of(prompt, sample)
                assert tokens == tokens_of(prompts[prompt], 4, sample, 60)
                assert text == CODEC.tokenizer.decode(tokens)
                assert logprobs == [-float(token) - 0.5 for token in tokens]
            assert sum(chunk.HasField("prompt") for chunk in reader.chunks) == 2
            ends = [c for c in reader.chunks if c.finish_reason]
            assert len(ends) == 4 and sum(len(c.token_bytes) for c in reader.chunks) == 240

    run(main())


def test_a_unary_call_is_answered_by_the_next_server() -> None:
    async def main() -> None:
        async with place() as (where, client):
            asked: list[Any] = [
                asyncio.create_task(client.generate([[5]], sampling={"seed": 1}, stopping=LENGTH)),
                asyncio.create_task(client.score([[5, 6, 7]])),
            ]
            await asyncio.sleep(0.05)
            await where.stop()
            await where.serve()
            generated, scored = await asyncio.gather(*asked)
            assert list(generated.results[0].samples[0].token_ids) == tokens_of([5], 1, 0, 60)
            assert len(scored.results) == 1

    run(main())


def test_an_answer_with_another_seed_is_not_taken_for_the_same() -> None:
    async def main() -> None:
        async with place() as (where, client):
            reader = Reader(client, [1])
            await reader.has(20)
            before = len(reader.chunks)
            await where.stop()
            await where.serve()
            with pytest.raises(
                ServiceError, match=r"UNAVAILABLE: .*give sampling.seed, or the server a state_dir"
            ) as e:
                await reader.task
            assert e.value.code is grpc.StatusCode.UNAVAILABLE
            assert len(reader.chunks) >= before, "what came is what came"

    run(main())


def test_a_server_that_does_not_come_back_is_waited_for_as_long_as_was_said() -> None:
    async def main() -> None:
        async with place(retry_seconds=0.6) as (where, client):
            reader = Reader(client, [1], sampling={"seed": 1})
            await reader.has(5)
            await where.stop()
            began = time.monotonic()
            with pytest.raises(ServiceError, match="UNAVAILABLE"):
                await reader.task
            with pytest.raises(ServiceError, match="DEADLINE_EXCEEDED.*UNAVAILABLE") as late:
                await client.generate([[1]], timeout=0.3)
            assert late.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert time.monotonic() - began < 20
            await where.serve()

    run(main())


def test_a_server_that_never_answered_is_not_waited_for() -> None:
    async def main() -> None:
        async with AsyncClient("127.0.0.1:1", retry_seconds=3600) as client:
            with pytest.raises(ServiceError, match="UNAVAILABLE"):
                await client.generate([[1]])

    run(main())


def chunk(*tokens: int, text: str = "", seed: int | None = None, end: bool = False) -> pb.GenerateChunk:
    made = pb.GenerateChunk(token_ids=tokens, text=text, finish_reason="FINISH_REASON_LENGTH" if end else None)
    if seed is not None:
        made.prompt.used.sampling.seed = seed
        made.prompt.used.sampling.temperature = 1.0
    return made


def test_what_is_news_does_not_depend_on_where_chunks_are_cut() -> None:
    stream = Continued()
    given = [stream.news(chunk(1, 2, 3, text="ab", seed=7)), stream.news(chunk(4, text="c"))]
    stream.begin_again(ServiceError("lost"))
    assert stream.news(chunk(1, 2, text="a", seed=7)) is None
    given.append(stream.news(chunk(3, 4, 5, 6, text="bcde")))
    given.append(stream.news(chunk(7, text="f", end=True)))
    stream.begin_again(ServiceError("lost"))
    assert stream.news(chunk(1, 2, 3, 4, 5, 6, 7, text="abcdef", seed=7, end=True)) is None
    assert [(list(c.token_ids), c.text) for c in given if c] == [
        ([1, 2, 3], "ab"), ([4], "c"), ([5, 6], "de"), ([7], "f"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "other", [chunk(1, 9, seed=7), chunk(1, 2, seed=8), chunk(1, text="x", seed=7), chunk(1, seed=7, end=True)]
)
def test_another_answer_is_refused(other: pb.GenerateChunk) -> None:
    stream = Continued()
    stream.news(chunk(1, 2, text="a", seed=7))
    stream.begin_again(ServiceError("lost"))
    with pytest.raises(ServiceError, match="lost; the answer to the retry has"):
        stream.news(other)
