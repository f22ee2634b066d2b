"""What one caller may use: calls per second, tokens in flight, calls open; and that everything is given back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.access.access_config import Access, Security, TlsConfig
from cluster.access.access_errors import OverQuota, RateLimited, TokensInFlight, TooManyCalls
from cluster.access.caller_limits import Accounts, OpenCalls
from cluster.access.token_file import Grant, Role, digest_of
from cluster.rpc.client.client import AsyncClient, ServiceError
from cluster.rpc.services.connection_limits import ServerLimits
from tests.cluster.access.token_files import TOKENS, access, security
from tests.cluster.frontend.fakes import ENDLESS, LASTING, FakeEngine
from tests.cluster.frontend.harness import run, until
from tests.cluster.rpc.certificates import Authority, Pair
from tests.cluster.rpc.harness import INFERENCE, Service, info, refused, service

ROOT = Path(__file__).resolve().parents[3]
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
LONG = {"max_new_tokens": LASTING}
WHOLE = {"max_new_tokens": 254}
"""What is left of a context after the longest prompt below."""
GRANT = Grant(name="a", digest=digest_of("x"), roles=frozenset(Role))


class Clock:
    """A time that stands still unless told otherwise."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_calls_beyond_the_rate_are_refused_until_time_has_passed() -> None:
    clock = Clock()
    account = Accounts(clock).of(replace(GRANT, requests_per_second=2.0))
    account.count_call()
    account.count_call()
    with pytest.raises(RateLimited, match=r"token 'a' may make 2 calls per second; retry in 0.50 s") as caught:
        account.count_call()
    assert caught.value.retry_seconds == 0.5
    clock.now += 0.5
    account.count_call()
    with pytest.raises(RateLimited):
        account.count_call()
    clock.now += 1000
    for _ in range(2):
        account.count_call()
    with pytest.raises(RateLimited):
        account.count_call()


def test_a_rate_below_one_per_second_still_lets_one_through() -> None:
    clock = Clock()
    account = Accounts(clock).of(replace(GRANT, requests_per_second=0.1))
    account.count_call()
    clock.now += 9.9
    with pytest.raises(RateLimited):
        account.count_call()
    clock.now += 0.11
    account.count_call()


def test_editing_the_token_file_changes_the_limit_but_forgets_nothing_that_is_used() -> None:
    accounts = Accounts(Clock())
    accounts.of(replace(GRANT, tokens_in_flight=10)).reserve(8)
    with pytest.raises(
        TokensInFlight, match="may have 9 tokens in flight, 8 are and this call would add 2; retry later"
    ):
        accounts.of(replace(GRANT, tokens_in_flight=9)).reserve(2)
    with pytest.raises(OverQuota, match="this call alone is 10"):
        accounts.of(replace(GRANT, tokens_in_flight=9)).reserve(10)
    accounts.of(replace(GRANT, name="b", tokens_in_flight=9)).reserve(9)


def test_one_client_at_its_limit_leaves_the_others_theirs() -> None:
    calls = OpenCalls(2)
    with calls.one_of("a"), calls.one_of("a"):
        with pytest.raises(TooManyCalls, match="a has 2 calls open"), calls.one_of("a"):
            pass
        with calls.one_of("b", most=1), pytest.raises(TooManyCalls), calls.one_of("b", most=1):
            pass
    assert len(calls._open) == 0, "a client that is gone is forgotten"


def limited(folder: Path, more: str) -> dict[str, Any]:
    """A service whose token to generate has these limits, and a client with it."""
    return {"security": security(folder, more), "access": access(folder, TOKENS[Role.GENERATE])}


def test_the_rate_holds_on_the_wire_and_other_tokens_do_not_feel_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with service(**limited(tmp_path, "requests_per_second = 0.01")) as s:
            await s.client.generate([[1]])
            error = await refused(s.client.generate([[1]]), EXHAUSTED, "may make 0.01 calls per second")
            assert info(error).reason == "RATE_LIMITED" and info(error).metadata["retryable"] == "true"
            assert any(isinstance(d, RetryInfo) and d.retry_delay.seconds > 30 for d in error.details)
            assert s.engine.submitted == 1
            async with AsyncClient(s.address, access(tmp_path, TOKENS[Role.CONTROL])) as other:
                for _ in range(3):
                    await other.server_info()

    run(main())


def test_tokens_in_flight_are_what_is_read_and_may_be_written_of_every_sample(tmp_path: Path) -> None:
    async def main() -> None:
        async with service(FakeEngine(held=True), **limited(tmp_path, "tokens_in_flight = 20")) as s:
            two: dict[str, Any] = {"sampling": {"n": 2}, "stopping": {"max_new_tokens": 5}}
            error = await refused(s.client.generate(["ab" * 11], **two), EXHAUSTED, "this call alone is 21")
            assert info(error).reason == "OVER_QUOTA" and info(error).metadata["retryable"] == "false"
            open_call = asyncio.create_task(s.client.generate([[1] * 3, "ab"], **two))  # 3 + 1 + 2 * 2 * 5 is too many
            await refused(open_call, EXHAUSTED, "this call alone is 24")
            assert s.engine.submitted == s.frontend.num_open == 0
            open_call = asyncio.create_task(s.client.generate([[1] * 3], **two))  # 13
            await until(lambda: s.frontend.num_open == 1)
            error = await refused(s.client.score([[1] * 8]), EXHAUSTED, "13 are and this call would add 8")
            assert info(error).reason == "TOKENS_IN_FLIGHT" and info(error).metadata["retryable"] == "true"
            s.engine.held = False
            await open_call
            await s.client.score([[1] * 20])

    run(main())


async def leave(s: Service) -> None:
    stream = s.client.stream([[1]], stopping=WHOLE)
    await anext(stream)
    await stream.aclose()


async def time_out(s: Service) -> None:
    try:
        await s.client.generate([[1]], stopping=WHOLE, timeout=0.05)
    except ServiceError as error:
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def fail(s: Service) -> None:
    await refused(s.client.generate([[9, 9]]), grpc.StatusCode.INTERNAL, "told to fail")


async def be_rejected(s: Service) -> None:
    await refused(s.client.generate([[8, 8]]), EXHAUSTED, "told to reject")


async def come_to_an_end(s: Service) -> None:
    await s.client.generate([[1]], stopping={"max_new_tokens": 3})


async def given_back(s: Service) -> None:
    """Waits until a call is admitted again: a call that was cancelled ends on the server a moment later."""
    async with asyncio.timeout(60):
        while True:
            try:
                await s.client.model_info()
                return
            except ServiceError as error:
                assert info(error).reason == "TOO_MANY_CALLS", error
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("way", [leave, time_out, fail, be_rejected, come_to_an_end])
def test_however_a_call_ends_its_tokens_and_its_place_are_given_back(way: Any, tmp_path: Path) -> None:
    async def main() -> None:
        engine = FakeEngine(step_seconds=0.002, error_on_prompt=(9, 9), reject_prompt=(8, 8))
        async with service(engine, **limited(tmp_path, "tokens_in_flight = 258\ncalls = 1")) as s:
            for _ in range(3):
                await way(s)
                await until(lambda: s.frontend.num_open == 0)
                await given_back(s)
            await s.client.generate([[1, 2]], stopping=WHOLE)  # 256: all there is of a context

    run(main())


def test_a_training_call_counts_the_tokens_of_its_sequences_while_it_is_open(tmp_path: Path) -> None:
    async def main() -> None:
        plain = security(tmp_path)
        assert plain.token_file is not None
        file = Path(plain.token_file)
        file.write_text(file.read_text().replace("roles = ['train']", "roles = ['train']\ntokens_in_flight = 4"))
        async with service(security=plain, access=access(tmp_path, TOKENS[Role.TRAIN])) as s:
            step: dict[str, Any] = {"optimizer": {"learning_rate": 0.1}, "expected_step": 0}
            await refused(s.client.train_step([[1, 2, 3], [4, 5]], **step), EXHAUSTED, "this call alone is 5")
            for _ in range(3):
                await refused(s.client.train_step([[1, 2, 3]], **step), grpc.StatusCode.FAILED_PRECONDITION, "")

    run(main())


def test_a_token_has_its_own_number_of_calls_whatever_connection_they_come_by(tmp_path: Path) -> None:
    async def main() -> None:
        async with service(FakeEngine(limits=ENDLESS, step_seconds=0.01), **limited(tmp_path, "calls = 2")) as s:
            async with AsyncClient(s.address, access(tmp_path, TOKENS[Role.GENERATE])) as again:
                streams = [client.stream([[1]], stopping=LONG) for client in (s.client, again)]
                await asyncio.gather(*map(anext, streams))
                error = await refused(again.model_info(), EXHAUSTED, "token 'generate' has 2 calls open")
                assert info(error).reason == "TOO_MANY_CALLS" and info(error).metadata["retryable"] == "true"
                async with AsyncClient(s.address, access(tmp_path, TOKENS[Role.CONTROL])) as other:
                    await other.model_info()
                await streams.pop().aclose()
                await until(lambda: s.frontend.num_open == 1)
                await given_back(s)
                await again.model_info()
                await streams.pop().aclose()

    run(main())


def test_without_tokens_an_address_is_a_client_and_health_streams_have_places_of_their_own() -> None:
    async def main() -> None:
        async with service(limits=ServerLimits(max_calls_per_client=2, max_health_calls_per_client=2)) as s:
            stub = health_pb2_grpc.HealthStub(s.client.channel)
            async with AsyncExitStack() as stack:
                for _ in range(2):
                    watch: Any = stub.Watch(health_pb2.HealthCheckRequest())
                    stack.callback(watch.cancel)
                    await watch.read()
                with pytest.raises(grpc.aio.AioRpcError, match=r"ipv4:127.0.0.1 has 2 calls open") as caught:
                    await stub.Check(health_pb2.HealthCheckRequest())
                assert caught.value.code() is EXHAUSTED
                await s.client.model_info()
            await given_back(s)

    run(main())


def test_a_call_counts_before_its_message_has_come_and_ends_if_none_does() -> None:
    async def main() -> None:
        limits = ServerLimits(max_calls_per_client=2, receive_seconds=3.0)
        async with service(limits=limits) as s:
            channel: Any = s.client.channel
            silent = [channel.stream_unary(INFERENCE + "Generate")() for _ in range(2)]  # never send anything
            await asyncio.sleep(0.5)
            await refused(s.client.model_info(), EXHAUSTED, "has 2 calls open")
            for call in silent:
                assert await call.code() is grpc.StatusCode.ABORTED
                assert "no message came within 3 s" in await call.details()
            await given_back(s)
            nothing = channel.stream_unary(INFERENCE + "Generate")(iter(()))
            assert await nothing.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert s.engine.submitted == 0

    run(main())


def test_with_client_certificates_the_name_in_each_is_a_client(tmp_path: Path) -> None:
    ca = Authority(tmp_path, "ours")
    server = ca.sign("server")
    protected = Security(tls=TlsConfig(cert=server.cert, key=server.key, client_ca=ca.path))

    def shows(pair: Pair) -> Access:
        return Access(tls_ca=ca.path, tls_cert=pair.cert, tls_key=pair.key)

    async def main() -> None:
        alice, bob, limits = shows(ca.sign("alice")), shows(ca.sign("bob")), ServerLimits(max_calls_per_client=1)
        engine = FakeEngine(limits=ENDLESS, step_seconds=0.01)
        async with service(engine, limits=limits, security=protected, access=alice) as s:
            stream = s.client.stream([[1]], stopping=LONG)
            await anext(stream)
            await refused(s.client.model_info(), EXHAUSTED, "certificate 'alice' has 1 calls open")
            async with AsyncClient(s.address, bob) as other:
                await other.model_info()
            await stream.aclose()

    run(main())


READER = """
import asyncio, sys
from cluster.rpc.client.client import AsyncClient
async def main():
    async with AsyncClient(sys.argv[1]) as client:
        async for chunk in client.stream([[1]], stopping={"max_new_tokens": 1 << 24}):
            print("reading", flush=True)
asyncio.run(main())
"""


async def reader(address: str) -> AsyncIterator[subprocess.Popen[str]]:
    """A client in a process of its own that reads a long stream."""
    process = subprocess.Popen(
        [sys.executable, "-c", READER, address], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "reading\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_client_that_vanishes_frees_its_memory(how: signal.Signals) -> None:
    """Killed, the connection ends; frozen (or its cable cut) it answers no ping."""

    async def main() -> None:
        slow = FakeEngine(limits=ENDLESS, step_seconds=0.1)
        async with service(slow, limits=ServerLimits(keepalive_seconds=1, keepalive_timeout_seconds=1)) as s:
            async for process in reader(s.address):
                assert s.frontend.num_open == 1
                os.kill(process.pid, how)
                await until(lambda: s.frontend.num_open == 0 and s.engine.idle)

    run(main())
