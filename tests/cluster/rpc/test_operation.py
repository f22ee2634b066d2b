"""Running the service: health, drain, faults, deadlines, cancellation, limits, reflection, the blocking client."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.rpc.client.client import Client, ServiceError
from cluster.rpc.server import build_server
from cluster.rpc.services.connection_limits import ServerLimits
from parallel.errors import ConfigError
from tests.cluster.frontend.fakes import ENDLESS, LASTING, FakeEngine
from tests.cluster.frontend.harness import run, until
from tests.cluster.rpc.harness import Service, info, refused, service
from tp_decoders.protocol import control_pb2, inference_pb2
from tp_decoders.protocol.inference_pb2_grpc import InferenceStub

Health = health_pb2.HealthCheckResponse
LONG = {"max_new_tokens": LASTING}
HOURS = {"max_new_tokens": 1 << 20}
"""At 20 ms a token; the answer still fits one message, which a call without a stream must."""


def endless(step_seconds: float = 0.01) -> FakeEngine:
    return FakeEngine(limits=ENDLESS, step_seconds=step_seconds)


def test_a_full_queue_is_retryable_and_says_when() -> None:
    async def main() -> None:
        async with service(endless(), max_open_requests=1) as s:
            first = s.client.stream([[1]], stopping=LONG)
            await anext(first)
            error = await refused(s.client.generate([[2]]), grpc.StatusCode.RESOURCE_EXHAUSTED, "1 samples are open")
            assert info(error).metadata["retryable"] == "true"
            assert any(isinstance(d, RetryInfo) and d.retry_delay.ToMilliseconds() > 0 for d in error.details)
            await first.aclose()

    run(main())


def test_an_engine_fault_names_rank_node_and_cause_and_health_follows() -> None:
    async def main() -> None:
        async with service(FakeEngine(crash_at_step=2)) as s:
            await becomes(s, "", Health.SERVING)
            error = await refused(s.client.generate([[1]]), grpc.StatusCode.UNAVAILABLE, "told to fail")
            facts = info(error).metadata
            assert (
                (facts["rank"], facts["retryable"]) == ("0", "true")
                and facts["node"]
                and "told to fail" in facts["cause"]
            )
            for name in ("", "tp_decoders.v1.Inference"):
                await becomes(s, name, Health.NOT_SERVING)
            await becomes(s, "tp_decoders.v1.Control", Health.SERVING)
            server = await s.client.server_info()
            assert server.state == control_pb2.SERVING_STATE_FAILED and "told to fail" in server.fault

    run(main())


def test_drain_over_the_wire_finishes_what_runs_and_refuses_what_comes() -> None:
    async def main() -> None:
        async with service(FakeEngine(step_seconds=0.02)) as s:
            running = asyncio.create_task(s.client.generate([[1]], stopping={"max_new_tokens": 150}))
            await until(lambda: s.frontend.num_open == 1)
            draining = asyncio.create_task(s.client.drain(60.0))
            await until(lambda: s.frontend.state.value == "draining")
            error = await refused(s.client.generate([[2]]), grpc.StatusCode.UNAVAILABLE, "shutting down")
            assert info(error).reason == "DRAINING"
            await becomes(s, "tp_decoders.v1.Inference", Health.NOT_SERVING)
            assert len((await running).results[0].samples[0].token_ids) == 150
            assert await draining == 0
            await refused(s.client.drain(math.nan), grpc.StatusCode.INVALID_ARGUMENT, "grace_seconds")

    run(main())


def test_server_model_and_load_are_told() -> None:
    async def main() -> None:
        async with service(FakeEngine(step_seconds=0.05)) as s:
            server, model = await s.client.server_info(), await s.client.model_info()
            assert (server.api_version, server.parallelism.tensor_parallel_size) == ("tp_decoders.v1", 2)
            assert server.state == control_pb2.SERVING_STATE_SERVING and server.max_message_bytes == 64 << 20
            assert (model.model_id, model.vocab_size, model.max_context) == (
                "fake",
                13,
                256,
            ) and model.supports_text_input
            stream = s.client.stream([[1], [2]], request_id="x", stopping={"max_new_tokens": 250})
            await anext(stream)
            load = await s.client.load()
            assert (load.running, load.open_requests) == (2, 2) and load.kv_blocks_total - load.kv_blocks_free == 2
            assert await s.client.abort(["x"]) == 2
            rest = [chunk async for chunk in stream]
            assert [c.finish_reason for c in rest][-2:] == [inference_pb2.FINISH_REASON_ABORTED] * 2
            await until(lambda: s.engine.idle)

    run(main())


def test_a_deadline_reaches_the_engine_and_frees_it() -> None:
    async def main() -> None:
        async with service(endless()) as s:
            try:
                answer = await s.client.generate([[1]], stopping=HOURS, timeout=0.2)
                assert answer.results[0].samples[0].finish_reason == inference_pb2.FINISH_REASON_DEADLINE
            except ServiceError as error:  # either side may be the first to see the time run out
                assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED, error
            await until(lambda: s.engine.idle and s.frontend.num_open == 0)

    run(main())


def test_a_cancelled_call_frees_the_engine() -> None:
    async def main() -> None:
        async with service(endless()) as s:
            unary = asyncio.create_task(s.client.generate([[1]], stopping=HOURS))
            stream = s.client.stream([[2]], stopping=LONG)
            await anext(stream)
            await until(lambda: len(s.engine.live) == 2)
            unary.cancel()
            await stream.aclose()
            await until(lambda: s.engine.idle and s.frontend.num_open == 0)

    run(main())


def test_reflection_lists_the_services_unless_it_is_switched_off() -> None:
    async def main(on: bool) -> set[str]:
        async with service(limits=ServerLimits(reflection=on)) as s:
            stub = reflection_pb2_grpc.ServerReflectionStub(s.client.channel)
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            return {item.name async for answer in call for item in answer.list_services_response.service}

    names = run(main(True))
    assert {"tp_decoders.v1.Inference", "tp_decoders.v1.Control", "grpc.health.v1.Health"} <= names
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        run(main(False))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_port_in_use_is_one_readable_error() -> None:
    async def main() -> None:
        async with service() as s:
            with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{s.server.port}"):
                build_server(s.frontend, s.address)

    run(main())


def test_more_calls_at_once_than_allowed_are_refused_not_queued() -> None:
    async def main() -> None:
        async with service(endless(), limits=ServerLimits(max_concurrent_rpcs=3)) as s:
            streams = [s.client.stream([[i]], stopping=LONG) for i in range(3)]
            await asyncio.gather(*map(anext, streams))
            await refused(s.client.model_info(timeout=60), grpc.StatusCode.RESOURCE_EXHAUSTED, "")
            for stream in streams:
                await stream.aclose()
            await until(lambda: s.engine.idle)
            await s.client.model_info()

    run(main())


def test_a_stream_that_nobody_reads_is_dropped_after_the_limit() -> None:
    async def main() -> None:
        big = FakeEngine(tokens_per_step=200)
        async with service(big, limits=ServerLimits(write_seconds=1.0)) as s:
            at_most_64_kib_in_flight = [("grpc.http2.bdp_probe", 0)]
            narrow: Any = grpc.aio.insecure_channel(s.address, options=at_most_64_kib_in_flight)
            call = InferenceStub(narrow).GenerateStream(
                inference_pb2.GenerateRequest(
                    prompts=[{"token_ids": {"ids": [i % 13]}} for i in range(40)],
                    sampling={"n": 8, "seed": 1},
                    stopping={"max_new_tokens": 200},
                    response={"logprobs": 1},
                )
            )
            await asyncio.sleep(0)
            good = await s.client.generate([[1]], stopping={"max_new_tokens": 4})
            assert len(good.results[0].samples[0].token_ids) == 4
            await until(lambda: s.engine.idle)
            await asyncio.sleep(3.0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            assert caught.value.code() is grpc.StatusCode.ABORTED and "nothing was read" in str(caught.value.details())
            await narrow.close()

    run(main())


def test_the_blocking_client_does_the_same() -> None:
    ports: list[str] = []
    done = threading.Event()

    async def main() -> None:
        async with service() as s:
            ports.append(s.address)
            await asyncio.to_thread(done.wait, 100)

    thread = threading.Thread(target=lambda: run(main()), daemon=True)
    thread.start()
    try:
        while not ports:
            assert thread.is_alive()
            time.sleep(0.01)
        with Client(ports[0]) as client:
            client.ready(60.0)
            assert len(client.generate([[1]], stopping={"max_new_tokens": 4}).results[0].samples[0].token_ids) == 4
            tokens = [t for chunk in client.stream([[1]], stopping={"max_new_tokens": 4}) for t in chunk.token_ids]
            assert len(tokens) == 4
            with pytest.raises(ServiceError, match="INVALID_ARGUMENT: .*prompts"):
                client.generate([])
            assert client.load().open_requests == 0 and client.model_info().model_id == "fake"
            assert client.score([[1, 2]]).results[0].logprobs == [-0.25]
    finally:
        done.set()
        thread.join(60)


async def becomes(s: Service, name: str, status: int) -> None:
    """Health follows the front-end's state within a moment."""
    stub = health_pb2_grpc.HealthStub(s.client.channel)
    async with asyncio.timeout(60):
        while (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status != status:
            await asyncio.sleep(0.01)
