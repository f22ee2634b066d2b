"""Answers that nobody reads, and health without a token: places and bytes are kept, counted and bounded."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from cluster.access.access_errors import AnswersUnread, TooManyCalls
from cluster.access.caller_limits import OpenCalls
from cluster.access.token_file import Role
from cluster.rpc.client.client import AsyncClient
from cluster.rpc.services.connection_limits import ServerLimits
from cluster.rpc.services.unsent_answers import ALWAYS_BYTES, Bounds, UnsentAnswers, hang_up
from tests.cluster.access.token_files import TOKENS, access, security
from tests.cluster.frontend.harness import run, until
from tests.cluster.rpc.harness import INFERENCE, service
from tests.cluster.rpc.raw_http2 import RawClient
from tp_decoders.protocol import inference_pb2 as pb

MB = 1 << 20
LARGE = pb.DetokenizeRequest(sequences=[pb.TokenIds(ids=[6] * 250)] * 1000).SerializeToString()
"""Its answer has 0.75 MB."""


def test_a_client_that_reads_no_answer_keeps_its_places_and_its_bytes_and_is_hung_up_on() -> None:
    limits = ServerLimits(max_calls_per_client=20, write_seconds=2.0, max_unread_bytes_per_client=8 * MB)

    async def main() -> None:
        async with service(limits=limits) as s:
            for _ in range(3):  # what is being read and made at once, and what allocators keep of it, is another matter
                await asyncio.gather(*(s.raw(INFERENCE + "Detokenize", LARGE) for _ in range(10)))
            base = psutil.Process().memory_info().rss
            raws = [await asyncio.to_thread(RawClient, s.server.port, 0, "127.0.0.9") for _ in range(3)]
            most = 0
            open_ones = list(raws)
            for _ in range(300):
                for raw in list(open_ones):
                    with suppress(ConnectionError):
                        raw.call(INFERENCE + "Detokenize", LARGE)
                    if not await asyncio.to_thread(raw.tend, 0.01):
                        open_ones.remove(raw)
                most = max(most, psutil.Process().memory_info().rss - base)
                if not open_ones:
                    break
            print(f"answers of 0.75 MB that nobody reads: {most / MB:.0f} MB more, then hung up on")
            # of 20 calls each has its message, ids, texts and answer in hand, 5 MB; and twice the bound of 8 MB
            assert most < 120 * MB, "more than the calls in hand and the bound"
            assert not open_ones, "nobody hung up"
            assert await s.client.tokenize(["ab"]), "others are served"
            raws.append(await asyncio.to_thread(RawClient, s.server.port, 65535, "127.0.0.9"))
            raws[-1].call(INFERENCE + "Tokenize", pb.TokenizeRequest(texts=["ab"]).SerializeToString())
            await until(lambda: raws[-1].tend(0.05) and raws[-1].ended() == 1)
            for raw in raws:
                raw.close()

    run(main())


def test_whoever_reads_gets_large_answers_and_whoever_does_not_is_hung_up_on_for_small_ones_too() -> None:
    async def main() -> None:
        async with service(limits=ServerLimits(write_seconds=0.2)) as s:
            assert len(await s.raw(INFERENCE + "Detokenize", LARGE)) > 700_000, "whoever reads gets all of it"
            slow = await asyncio.to_thread(RawClient, s.server.port, 0)
            slow.call(INFERENCE + "Tokenize", pb.TokenizeRequest(texts=["ab"]).SerializeToString())
            for _ in range(200):
                if not await asyncio.to_thread(slow.tend, 0.1):
                    break
            else:
                raise AssertionError("nobody hung up")

    run(main())


class Stuck:
    """A context whose write takes as long as it is told."""

    def __init__(self) -> None:
        self.sent = asyncio.Event()

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def send_initial_metadata(self, metadata: tuple[()]) -> None:
        pass

    async def write(self, data: bytes) -> None:
        await self.sent.wait()


def test_bytes_are_bounded_for_each_client_and_for_all_of_them() -> None:
    async def main() -> None:
        unsent = UnsentAnswers(Bounds(100 * MB, 10 * MB, 25 * MB, 60.0))
        stuck, tasks = Stuck(), []

        def send(client: str, size: int) -> asyncio.Task[None]:
            async def sent() -> None:
                with ExitStack() as held:
                    await unsent.send(stuck, client, bytes(size), held)

            tasks.append(asyncio.create_task(sent()))
            return tasks[-1]

        send("a", 8 * MB)
        await asyncio.sleep(0)
        with pytest.raises(AnswersUnread, match="a has 8388608 bytes of answers on their way"):
            await send("a", 3 * MB)
        send("b", 12 * MB)  # one is let through, whatever its size
        await asyncio.sleep(0)
        with pytest.raises(AnswersUnread, match="to all clients"):
            await send("c", 6 * MB)
        send("c", ALWAYS_BYTES)
        await asyncio.sleep(0)
        assert unsent.num_bytes == 24 * MB
        stuck.sent.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert unsent.num_bytes == 0 and sum(isinstance(item, AnswersUnread) for item in done) == 2

    run(main())


def test_watching_health_without_a_token_takes_no_place_of_those_who_have_one(tmp_path: Path) -> None:
    limits = ServerLimits(max_concurrent_rpcs=300)

    async def main() -> None:
        mine = access(tmp_path, TOKENS[Role.GENERATE])
        async with service(limits=limits, security=security(tmp_path), access=mine) as s:
            raws = [await asyncio.to_thread(RawClient, s.server.port, 65535, f"127.0.0.{10 + i}") for i in range(10)]
            for raw in raws:
                for _ in range(60):
                    raw.call("/grpc.health.v1.Health/Watch")
            for _ in range(100):
                for raw in raws:
                    await asyncio.to_thread(raw.tend, 0.02)
                if sum(raw.ended() for raw in raws) >= 600 - 300 // 8:
                    break
            else:
                raise AssertionError(f"{sum(raw.ended() for raw in raws)} of 600 were refused")
            for _ in range(3):
                assert await s.client.tokenize(["ab"])
            for raw in raws:
                raw.close()

    run(main())


def test_when_most_places_are_taken_those_who_have_many_get_no_more() -> None:
    calls = OpenCalls(10, in_all=20)
    held = [calls.one_of("a") for _ in range(10)] + [calls.one_of("b") for _ in range(5)]
    for place in held:
        place.__enter__()
    with calls.one_of("c"):
        with pytest.raises(TooManyCalls, match="b has 6 calls open"), calls.one_of("b"), calls.one_of("b"):
            pass
        with pytest.raises(TooManyCalls, match="a has 6 calls open"), calls.one_of("a"):
            pass
    for place in held:
        place.__exit__(None, None, None)
    with calls.one_of("a"):
        pass


def test_hanging_up_finds_the_connection_by_its_peer() -> None:
    async def main() -> None:
        async with service() as s, AsyncClient(s.address) as other:
            await other.ready(20)
            raw = await asyncio.to_thread(RawClient, s.server.port)
            host, port = raw.socket.getsockname()
            assert not hang_up("unix:/nothing") and not hang_up("ipv4:127.0.0.1:1")
            await until(lambda: hang_up(f"ipv4:{host}:{port}"))
            assert not await asyncio.to_thread(raw.tend, 20.0)
            assert await other.tokenize(["ab"]), "others stay"

    run(main())
