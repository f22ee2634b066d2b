"""The service over a real local gRPC server: answers, errors with details, health, reflection, control."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.frontend.text import FimTokens
from cluster.rpc.client import Client, ServiceError
from cluster.rpc.limits import ServerLimits
from cluster.rpc.proto import control_pb2, inference_pb2
from cluster.rpc.proto.inference_pb2_grpc import InferenceStub
from cluster.rpc.server import build_server
from parallel.errors import ConfigError
from tests.cluster.frontend.fakes import CODEC, FakeEngine, scores_of, tokens_of
from tests.cluster.frontend.harness import run, until
from tests.cluster.rpc.harness import Service, service

Health = health_pb2.HealthCheckResponse


def test_generate_answers_every_prompt_with_samples_parameters_and_what_was_asked_for() -> None:
    async def main() -> None:
        async with service() as s:
            answer = await s.client.generate(
                [[1, 2], "ab a"],
                request_id="mine",
                sampling={"seed": 5, "n": 2, "temperature": 0.7},
                stopping={"max_new_tokens": 6},
                response={"logprobs": 1, "prompt_logprobs": 1, "token_bytes": True, "echo": True, "timings": True},
            )
            assert answer.request_id == "mine" and [r.prompt_index for r in answer.results] == [0, 1]
            for result, ids in zip(answer.results, ((1, 2), (3, 5, 0)), strict=True):
                check_result(result, ids)

    run(main())


def check_result(result: inference_pb2.GenerateResult, ids: tuple[int, ...]) -> None:
    assert result.status.code == 0 and result.prompt_tokens == len(ids) and tuple(result.prompt_token_ids) == ids
    used = result.used
    assert (used.sampling.seed, used.sampling.temperature, used.sampling.n) == (5, 0.7, 2)
    assert used.stopping.max_new_tokens == 6 and not used.sampling.HasField("top_p")
    assert [p.logprob for p in result.prompt_logprobs] == [e.logprob for e in scores_of(ids)]
    for index, sample in enumerate(result.samples):
        tokens = tokens_of(ids, 5, index, 6)
        assert sample.index == index and list(sample.token_ids) == tokens
        assert sample.text == CODEC.tokenizer.decode([*ids, *tokens])
        assert list(sample.token_bytes) == [CODEC.tokenizer.token_bytes(t) for t in tokens]
        assert list(sample.logprobs) == [-t - 0.5 for t in tokens]
        assert [t.tokens[0].token_id for t in sample.top_logprobs] == tokens
        assert sample.finish_reason == inference_pb2.FINISH_REASON_LENGTH and sample.weight_version == 7
        assert sample.timings.total > 0


def test_what_was_not_asked_for_does_not_come() -> None:
    async def main() -> None:
        async with service() as s:
            (result,) = (await s.client.generate([[1]], stopping={"max_new_tokens": 3})).results
            (sample,) = result.samples
            assert not (sample.logprobs or sample.top_logprobs or sample.token_bytes or sample.HasField("timings"))
            assert not (result.prompt_logprobs or result.prompt_token_ids)
            assert result.used.sampling.HasField("seed"), "the seed drawn comes back: the answer can be asked for again"
            again = await s.client.generate(
                [[1]], sampling={"seed": result.used.sampling.seed}, stopping={"max_new_tokens": 3}
            )
            assert again.results[0].samples[0].token_ids == sample.token_ids

    run(main())


def test_a_stream_put_together_equals_the_unary_answer() -> None:
    async def main() -> None:
        async with service(FakeEngine(step_seconds=0.02)) as s:
            fields: dict[str, Any] = {
                "sampling": {"seed": 5, "n": 2},
                "stopping": {"max_new_tokens": 20, "stop_sequences": ["ba", "é"]},
                "response": {"logprobs": 1, "prompt_logprobs": 0, "token_bytes": True},
            }
            prompts = [[i, 2] for i in range(6)]
            whole = await s.client.generate(prompts, **fields)
            parts: dict[tuple[int, int], inference_pb2.Sample] = {}
            chunks = [chunk async for chunk in s.client.stream(prompts, **fields)]
            for chunk in chunks:
                sample = parts.setdefault(
                    (chunk.prompt_index, chunk.sample_index), inference_pb2.Sample(index=chunk.sample_index)
                )
                add_chunk(sample, chunk)
            for result in whole.results:
                assert list(result.samples) == [parts[result.prompt_index, i] for i in range(2)]
            heads = {chunk.prompt_index: chunk for chunk in reversed(chunks) if chunk.HasField("prompt")}
            assert {i: head.prompt.used for i, head in heads.items()} == {r.prompt_index: r.used for r in whole.results}
            assert len(chunks) > 12, "it was streamed, not sent at once"

    run(main())


def add_chunk(sample: inference_pb2.Sample, chunk: inference_pb2.GenerateChunk) -> None:
    sample.text += chunk.text
    sample.token_ids.extend(chunk.token_ids)
    sample.logprobs.extend(chunk.logprobs)
    sample.top_logprobs.extend(chunk.top_logprobs)
    sample.token_bytes.extend(chunk.token_bytes)
    sample.finish_reason = sample.finish_reason or chunk.finish_reason
    sample.stop_sequence += chunk.stop_sequence
    sample.weight_version = max(sample.weight_version, chunk.weight_version)
    if chunk.HasField("stop_token_id"):
        sample.stop_token_id = chunk.stop_token_id


def test_score_gives_one_log_probability_per_token_after_the_first() -> None:
    async def main() -> None:
        async with service() as s:
            answer = await s.client.score([[1, 2, 3], "ab a", [1]], temperature=0.5, top_logprobs=1)
            assert [list(r.token_ids) for r in answer.results] == [[1, 2, 3], [3, 5, 0], []]
            assert list(answer.results[0].logprobs) == [-0.25, -0.5]
            assert [t.tokens[0].token_id for t in answer.results[0].top_logprobs] == [2, 3]
            assert answer.results[2].status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert not (await s.client.score([[1, 2]])).results[0].top_logprobs

    run(main())


def test_tokenize_and_detokenize() -> None:
    async def main() -> None:
        async with service() as s:
            tokens = await s.client.tokenize(["ab a", "é日"])
            assert [list(t.ids) for t in tokens.results] == [[3, 5, 0], [10, 11, 12]]
            back = await s.client.detokenize([[3, 5, 0], [99], []])
            assert [(r.status.code, r.text) for r in back.results] == [(0, "ab a"), (3, ""), (0, "")]
            await refused(s.client.tokenize([]), grpc.StatusCode.INVALID_ARGUMENT, "texts")

    run(main())


def test_items_that_fail_have_their_own_status_and_a_call_of_only_such_items_fails() -> None:
    async def main() -> None:
        async with service(FakeEngine(error_on_prompt=(7,))) as s:
            answer = await s.client.generate([[1], [], [7], [2]], stopping={"max_new_tokens": 2})
            assert [r.status.code for r in answer.results] == [0, 3, 13, 0]
            assert [len(r.samples) for r in answer.results] == [1, 0, 0, 1]
            error = await refused(s.client.generate([[], [99]]), grpc.StatusCode.INVALID_ARGUMENT, "prompts[0]")
            assert violations(error) == ["prompts[0]"]
            seen = [chunk async for chunk in s.client.stream([[1], [99], [7]], stopping={"max_new_tokens": 2})]
            assert {c.prompt_index: c.status.code for c in seen if c.HasField("status")} == {1: 3, 2: 13}
            with pytest.raises(ServiceError, match="INTERNAL: told to fail"):
                [chunk async for chunk in s.client.stream([[7]])]

    run(main())


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"sampling": {"temperature": math.nan}}, "INVALID_ARGUMENT", "sampling.temperature"),
        ({"sampling": {"beam": {"width": 4}}}, "UNIMPLEMENTED", "sampling.beam"),
        ({"adapter": "lora"}, "UNIMPLEMENTED", "adapter"),
        ({"prompts": [{"fim": {"prefix": "a", "suffix": "b"}}]}, "INVALID_ARGUMENT", "prompts[0].fim"),
        ({"prompts": [{}]}, "INVALID_ARGUMENT", "prompts[0]"),
        ({"prompts": [{"text": "a" * 100_000}]}, "INVALID_ARGUMENT", "100000 characters"),
        ({"prompts": [{"token_ids": {"ids": [1] * 500}}]}, "INVALID_ARGUMENT", "500 tokens are too long"),
        ({"prompts": [{"token_ids": {"ids": [4294967295]}}]}, "INVALID_ARGUMENT", "4294967295"),
        ({"sampling": {"allowed_token_ids": [1] * 70_000}}, "INVALID_ARGUMENT", "70000 entries"),
    ],
    ids=range(9),
)
def test_an_error_names_its_field_in_text_and_details(fields: dict[str, Any], code: str, words: str) -> None:
    async def main() -> None:
        async with service() as s:
            message = inference_pb2.GenerateRequest(**{"prompts": [{"token_ids": {"ids": [1]}}], **fields})
            error = await refused(s.client.call(s.client.inference.Generate, message), grpc.StatusCode[code], words)
            assert violations(error), "the field is in the details too"

    run(main())


def test_a_checkpoint_without_a_tokenizer_serves_ids_and_says_so_about_text() -> None:
    async def main() -> None:
        async with service(codec=None) as s:
            (result,) = (
                await s.client.generate([[1]], stopping={"max_new_tokens": 4}, response={"echo": True})
            ).results
            assert len(result.samples[0].token_ids) == 4 and result.samples[0].text == ""
            for wrong in (s.client.generate(["a"]), s.client.tokenize(["a"])):
                error = await refused(wrong, grpc.StatusCode.FAILED_PRECONDITION, "no tokenizer")
                assert info(error).reason == "NO_TOKENIZER"
            assert not (await s.client.model_info()).supports_text_input

    run(main())


def test_a_prompt_with_a_hole_is_marked_with_the_models_own_tokens() -> None:
    async def main() -> None:
        async with service(codec=replace(CODEC, fim=FimTokens(prefix=7, suffix=8, middle=9))) as s:
            message = inference_pb2.GenerateRequest(
                prompts=[{"fim": {"prefix": "ab", "suffix": "c"}}],
                stopping={"max_new_tokens": 3},
                response={"echo": True},
            )
            answer = await s.client.call(s.client.inference.Generate, message)
            assert list(answer.results[0].prompt_token_ids) == [7, 3, 8, 2, 9]

    run(main())


def test_a_full_queue_is_retryable_and_says_when() -> None:
    async def main() -> None:
        async with service(FakeEngine(step_seconds=0.01), max_open_requests=1) as s:
            first = s.client.stream([[1]], stopping={"max_new_tokens": 200})
            await anext(first)
            error = await refused(s.client.generate([[2]]), grpc.StatusCode.RESOURCE_EXHAUSTED, "1 samples are open")
            assert info(error).metadata["retryable"] == "true"
            assert any(isinstance(d, RetryInfo) and d.retry_delay.ToMilliseconds() > 0 for d in error.details)
            await first.aclose()

    run(main())


def test_an_engine_fault_names_rank_node_and_cause_and_health_follows() -> None:
    async def main() -> None:
        async with service(FakeEngine(crash_at_step=2)) as s:
            assert await health(s, "") == Health.SERVING
            error = await refused(s.client.generate([[1]]), grpc.StatusCode.UNAVAILABLE, "told to fail")
            facts = info(error).metadata
            assert (
                (facts["rank"], facts["retryable"]) == ("0", "true")
                and facts["node"]
                and "told to fail" in facts["cause"]
            )
            assert await health(s, "") == await health(s, "tp_decoders.v1.Inference") == Health.NOT_SERVING
            assert await health(s, "tp_decoders.v1.Control") == Health.SERVING
            server = await s.client.server_info()
            assert server.state == control_pb2.SERVING_STATE_FAILED and "told to fail" in server.fault

    run(main())


def test_drain_over_the_wire_finishes_what_runs_and_refuses_what_comes() -> None:
    async def main() -> None:
        async with service(FakeEngine(step_seconds=0.005)) as s:
            running = asyncio.create_task(s.client.generate([[1]], stopping={"max_new_tokens": 40}))
            await until(lambda: s.frontend.num_open == 1)
            draining = asyncio.create_task(s.client.drain(10.0))
            await until(lambda: s.frontend.state.value == "draining")
            error = await refused(s.client.generate([[2]]), grpc.StatusCode.UNAVAILABLE, "shutting down")
            assert info(error).reason == "DRAINING"
            assert await health(s, "tp_decoders.v1.Inference") == Health.NOT_SERVING
            assert len((await running).results[0].samples[0].token_ids) == 40
            assert await draining == 0
            await refused(s.client.drain(math.nan), grpc.StatusCode.INVALID_ARGUMENT, "grace_seconds")

    run(main())


def test_server_model_and_load_are_told() -> None:
    async def main() -> None:
        async with service(FakeEngine(step_seconds=0.01)) as s:
            server, model = await s.client.server_info(), await s.client.model_info()
            assert (server.api_version, server.parallelism.tensor_parallel_size) == ("tp_decoders.v1", 2)
            assert server.state == control_pb2.SERVING_STATE_SERVING and server.max_message_bytes == 64 << 20
            assert (model.model_id, model.vocab_size, model.max_context) == (
                "fake",
                13,
                256,
            ) and model.supports_text_input
            stream = s.client.stream([[1], [2]], request_id="x", stopping={"max_new_tokens": 200})
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
        async with service(FakeEngine(step_seconds=0.01)) as s:
            started = time.monotonic()
            stopping = {"max_new_tokens": 200}
            try:
                answer = await s.client.generate([[1]], stopping=stopping, timeout=0.2)
                assert answer.results[0].samples[0].finish_reason == inference_pb2.FINISH_REASON_DEADLINE
            except ServiceError as error:  # either side may be the first to see the time run out
                assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED, error
            assert time.monotonic() - started < 1.0
            await until(lambda: s.engine.idle, 1.0)
            assert s.frontend.num_open == 0

    run(main())


def test_a_cancelled_call_frees_the_engine() -> None:
    async def main() -> None:
        async with service(FakeEngine(step_seconds=0.01)) as s:
            unary = asyncio.create_task(s.client.generate([[1]], stopping={"max_new_tokens": 200}))
            stream = s.client.stream([[2]], stopping={"max_new_tokens": 200})
            await anext(stream)
            await until(lambda: len(s.engine.live) == 2)
            unary.cancel()
            await stream.aclose()
            await until(lambda: s.engine.idle, 1.0)
            assert s.frontend.num_open == 0

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
        async with service(FakeEngine(step_seconds=0.01), limits=ServerLimits(max_concurrent_rpcs=3)) as s:
            streams = [s.client.stream([[i]], stopping={"max_new_tokens": 200}) for i in range(3)]
            await asyncio.gather(*map(anext, streams))
            await refused(s.client.model_info(timeout=5), grpc.StatusCode.RESOURCE_EXHAUSTED, "")
            for stream in streams:
                await stream.aclose()
            await until(lambda: s.engine.idle)
            await s.client.model_info()

    run(main())


def test_a_stream_that_nobody_reads_is_dropped_after_the_limit() -> None:
    async def main() -> None:
        big = FakeEngine(tokens_per_step=200)
        async with service(big, limits=ServerLimits(write_seconds=0.5)) as s:
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
            await until(lambda: s.engine.idle, 20.0)
            await asyncio.sleep(1.5)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            assert caught.value.code() is grpc.StatusCode.ABORTED and "nothing was read" in str(caught.value.details())
            await narrow.close()

    run(main(), 60)


def test_the_blocking_client_does_the_same() -> None:
    ports: list[str] = []
    done = threading.Event()

    async def main() -> None:
        async with service() as s:
            ports.append(s.address)
            await asyncio.to_thread(done.wait, 20)

    thread = threading.Thread(target=lambda: run(main()), daemon=True)
    thread.start()
    try:
        while not ports:
            assert thread.is_alive()
            time.sleep(0.01)
        with Client(ports[0]) as client:
            client.ready()
            assert len(client.generate([[1]], stopping={"max_new_tokens": 4}).results[0].samples[0].token_ids) == 4
            tokens = [t for chunk in client.stream([[1]], stopping={"max_new_tokens": 4}) for t in chunk.token_ids]
            assert len(tokens) == 4
            with pytest.raises(ServiceError, match="INVALID_ARGUMENT: .*prompts"):
                client.generate([])
            assert client.load().open_requests == 0 and client.model_info().model_id == "fake"
            assert client.score([[1, 2]]).results[0].logprobs == [-0.25]
    finally:
        done.set()
        thread.join(20)


async def refused(awaitable: Any, code: grpc.StatusCode, words: str) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await awaitable
    assert caught.value.code is code, caught.value
    assert words in str(caught.value)
    return caught.value


def info(error: ServiceError) -> ErrorInfo:
    return next(detail for detail in error.details if isinstance(detail, ErrorInfo))


def violations(error: ServiceError) -> list[str]:
    return [v.field for detail in error.details if isinstance(detail, BadRequest) for v in detail.field_violations]


async def health(s: Service, name: str) -> int:
    await asyncio.sleep(0.01)
    stub = health_pb2_grpc.HealthStub(s.client.channel)
    status: int = (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status
    return status
