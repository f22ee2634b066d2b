"""Traces of real calls to a real server, read back from a file and from a collector: what is a part of what."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent import futures
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

import launch.observe.trace_export
from cluster.engine.engine_config import EngineConfig
from cluster.frontend.call_traces import begin
from cluster.rpc.client.client import AsyncClient, Client
from launch.commands.server_process import Server
from launch.observe.observe_config import ObserveConfig
from launch.observe.trace_export import open_traces
from parallel.errors import ConfigError
from parallel.native.compiled import library
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.rpc.services.training_service import DOCUMENTS, training_service
from tp_decoders.protocol import inference_pb2 as pb
from tp_decoders.protocol.inference_pb2_grpc import InferenceStub

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CONTEXT = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("authorization", "Bearer not-to-be-seen-anywhere"))
ONE_BY_ONE = EngineConfig(kv_blocks=64, max_sequences=4, max_step_tokens=16)
Work = Callable[[AsyncClient], Coroutine[Any, Any, None]]
Found = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("gpt2", tmp_path_factory.mktemp("gpt2"))


@asynccontextmanager
async def traced_service(
    folder: Path, config: ObserveConfig, engine: EngineConfig = ONE_BY_ONE
) -> AsyncIterator[AsyncClient]:
    """Its spans are all sent when it is left."""
    traces = open_traces(config)
    assert traces is not None
    try:
        root = folder.parent / "states"
        async with training_service(folder, root=root, tracer=traces.tracer, config=engine) as client:
            yield client
    finally:
        await asyncio.to_thread(traces.close)


def spans_of(folder: Path, work: Work, file: Path, engine: EngineConfig = ONE_BY_ONE, **settings: Any) -> list[Found]:
    async def main() -> None:
        async with traced_service(folder, ObserveConfig(traces=str(file), **settings), engine) as client:
            await work(client)

    asyncio.run(main())
    return [json.loads(line) for line in file.read_text().splitlines()]


async def stream(client: AsyncClient, metadata: Any = CONTEXT, prompt: int = 40, new: int = 5, name: str = "") -> None:
    request = pb.GenerateRequest(request_id=name, prompts=[pb.Prompt(token_ids=pb.TokenIds(ids=range(1, prompt + 1)))])
    request.sampling.temperature = 0.0
    request.stopping.max_new_tokens, request.stopping.ignore_eos = new, True
    stub = InferenceStub(client.channel)
    async for _ in stub.GenerateStream(request, metadata=metadata, timeout=120):
        pass


def named(spans: list[Found], name: str) -> list[Found]:
    return [span for span in spans if span["name"] == name]


def children(spans: list[Found], parent: Found) -> list[str]:
    """Names, in the order of their beginnings."""
    mine = [span for span in spans if span["parent_id"] == parent["context"]["span_id"]]
    return [span["name"] for span in sorted(mine, key=lambda span: str(span["start_time"]))]


def test_a_streamed_request_is_one_trace_from_the_callers_span_to_the_engines_steps(
    folder: Path, tmp_path: Path
) -> None:
    spans = spans_of(folder, stream, tmp_path / "spans.jsonl")
    (call,) = named(spans, "tp_decoders.v1.Inference/GenerateStream")
    assert {span["context"]["trace_id"] for span in spans} == {f"0x{TRACE}"}
    assert call["parent_id"] == f"0x{PARENT}" and call["kind"] == "SpanKind.SERVER"
    assert call["attributes"]["rpc.grpc.status_code"] == 0
    assert children(spans, call) == ["admission", "prompt"]
    (prompt,), (prefill,), (decode,) = (named(spans, name) for name in ("prompt", "prefill", "decode"))
    assert children(spans, prompt) == ["queue", "prefill", "decode"]
    # 40 tokens in steps of at most 16, the last of which gives the first new one; four more
    assert children(spans, prefill) == ["engine.step"] * 3 and children(spans, decode) == ["engine.step"] * 4
    expected = {"outcome": "length", "tokens": 5, "steps": 7, "preemptions": 0, "prompt_tokens": 40, "samples": 1}
    assert {key: prompt["attributes"][key] for key in expected} == expected
    steps = [span["attributes"] for span in named(spans, "engine.step")]
    assert sorted(step["tokens"] for step in steps) == [1, 1, 1, 1, 8, 16, 16]
    assert all(step["forward_seconds"] > 0 for step in steps)
    events = {event["name"]: event["attributes"] for event in prompt["events"]}
    assert events["placed"] == {"replica": 0} and events["first_token"]["time_to_first_token"] > 0


def test_every_span_lies_within_the_one_above_it(folder: Path, tmp_path: Path) -> None:
    spans = spans_of(folder, stream, tmp_path / "spans.jsonl")
    by_id = {span["context"]["span_id"]: span for span in spans}
    below = [(span, by_id[span["parent_id"]]) for span in spans if span["parent_id"] in by_id]
    assert len(below) == len(spans) - 1, "one has its parent elsewhere"
    for span, above in below:
        assert above["start_time"] <= span["start_time"] <= span["end_time"] <= above["end_time"], (span, above)


def test_neither_tokens_nor_headers_are_in_a_trace(folder: Path, tmp_path: Path) -> None:
    async def work(client: AsyncClient) -> None:
        await stream(client, (*CONTEXT, ("baggage", "secret=of-the-caller")))

    spans_of(folder, work, tmp_path / "spans.jsonl")
    written = (tmp_path / "spans.jsonl").read_text()
    for secret in ("not-to-be-seen", "of-the-caller", "authorization", "token_ids", "[1, 2, 3"):
        assert secret not in written


def test_a_training_step_shows_what_it_waited_for_and_its_two_parts(folder: Path, tmp_path: Path) -> None:
    async def work(client: AsyncClient) -> None:
        step: dict[str, Any] = {"optimizer": {"learning_rate": 1e-3}, "expected_step": 0, "idempotency_key": "a"}
        await client.train_step(DOCUMENTS, **step)
        await client.train_step(DOCUMENTS, **step)
        await client.save_state("kept")

    spans = spans_of(folder, work, tmp_path / "spans.jsonl")
    first, again = named(spans, "training.TrainStep")
    assert children(spans, first) == ["wait", "forward_backward", "optimizer"] and children(spans, again) == []
    assert [each["attributes"]["replayed"] for each in (first, again)] == [False, True]
    expected = {"step": 1, "weight_version": 1, "sequences": 3}
    assert {key: first["attributes"][key] for key in expected} == expected and first["attributes"]["tokens"] > 0
    (saved,) = named(spans, "training.SaveState")
    assert saved["attributes"]["bytes"] > 1000
    calls = {span["context"]["span_id"]: span["name"] for span in spans if span["kind"] == "SpanKind.SERVER"}
    assert calls[first["parent_id"]] == "tp_decoders.v1.Training/TrainStep"


def test_a_prompt_that_gave_its_blocks_back_says_so(folder: Path, tmp_path: Path) -> None:
    async def work(client: AsyncClient) -> None:
        await asyncio.gather(*(stream(client, CONTEXT, prompt=30, new=40) for _ in range(3)))

    tight = EngineConfig(kv_blocks=8, max_sequences=4, max_step_tokens=64)
    spans = spans_of(folder, work, tmp_path / "spans.jsonl", tight)
    told = [[event for event in span["events"] if event["name"] == "preempted"] for span in named(spans, "prompt")]
    counted = [span["attributes"]["preemptions"] for span in named(spans, "prompt")]
    assert sum(counted) > 0 and [len(events) for events in told] == counted


def test_a_refused_call_is_an_error_in_its_trace(folder: Path, tmp_path: Path) -> None:
    async def work(client: AsyncClient) -> None:
        with pytest.raises(grpc.aio.AioRpcError):
            await stream(client, prompt=0)

    (call, admission) = sorted(
        spans_of(folder, work, tmp_path / "spans.jsonl"), key=lambda span: str(span["start_time"])
    )
    assert call["status"] == {"status_code": "ERROR", "description": "INVALID_ARGUMENT"}
    assert call["attributes"]["rpc.grpc.status_code"] == 3
    assert admission["name"] == "admission" and admission["status"]["description"] == "InvalidRequest"


def test_a_caller_decides_for_its_own_calls_and_the_ratio_for_the_others(folder: Path, tmp_path: Path) -> None:
    async def work(client: AsyncClient) -> None:
        await stream(client, ())
        await stream(client, (("traceparent", f"00-{TRACE}-{PARENT}-00"),))
        await stream(client, (("traceparent", "no trace at all"),))
        await stream(client, CONTEXT)

    spans = spans_of(folder, work, tmp_path / "spans.jsonl", trace_ratio=1e-12)
    assert len(named(spans, "prompt")) == 1
    assert {span["context"]["trace_id"] for span in spans} == {f"0x{TRACE}"}


def test_without_a_callers_trace_a_call_begins_its_own(folder: Path, tmp_path: Path) -> None:
    async def work(client: AsyncClient) -> None:
        for _ in range(2):
            await stream(client, (("traceparent", "00-zz-zz-01"),))

    spans = spans_of(folder, work, tmp_path / "spans.jsonl")
    calls = named(spans, "tp_decoders.v1.Inference/GenerateStream")
    assert [call["parent_id"] for call in calls] == [None, None]
    assert len({call["context"]["trace_id"] for call in calls}) == 2


def test_a_collector_gets_the_same_spans(folder: Path) -> None:
    given: list[str] = []

    def export(data: bytes, context: grpc.ServicerContext) -> bytes:
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            assert "tp-decoders" in str(resource.resource)
            given.extend(span.name for scope in resource.scope_spans for span in scope.spans)
        return b""

    method = grpc.method_handlers_generic_handler(
        "opentelemetry.proto.collector.trace.v1.TraceService", {"Export": grpc.unary_unary_rpc_method_handler(export)}
    )
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[method])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    async def main() -> None:
        async with traced_service(folder, ObserveConfig(traces=f"http://127.0.0.1:{port}")) as client:
            await stream(client)

    asyncio.run(main())
    server.stop(None).wait(30)
    assert sorted(set(given)) == [
        "admission", "decode", "engine.step", "prefill", "prompt", "queue", "tp_decoders.v1.Inference/GenerateStream",
    ]  # fmt: skip


def test_off_means_that_neither_the_sdk_nor_an_exporter_is_imported() -> None:
    code = (
        "import sys, cluster.rpc.server, launch.observe.trace_export\n"
        "from launch.observe.observe_config import ObserveConfig\n"
        "launch.observe.trace_export.check_traces(ObserveConfig())\n"
        "assert launch.observe.trace_export.open_traces(ObserveConfig()) is None\n"
        "unwanted = ('opentelemetry.sdk', 'opentelemetry.exporter', 'launch.observe.otel')\n"
        "print([name for name in sys.modules if name.startswith(unwanted)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_cannot_be_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="a file that cannot be written: .*; name another, or an address"):
        launch.observe.trace_export.check_traces(ObserveConfig(traces=str(tmp_path / "no" / "folder")))
    with pytest.raises(ConfigError, match=r"trace_ratio is 0\.0; give a number above 0"):
        ObserveConfig(trace_ratio=0.0)
    monkeypatch.setattr(launch.observe.trace_export, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="grpc is not installed; pip install 'tp-decoders.otel.'") as refused:
        launch.observe.trace_export.check_traces(ObserveConfig(traces="http://127.0.0.1:4317"))
    assert str(refused.value).count("\n") == 0


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_command_traces_a_call_through_the_ranks_of_a_group(tmp_path: Path) -> None:
    library.available()  # built here where it is not yet
    model, file = save_tiny("gpt2", tmp_path / "model"), tmp_path / "spans.jsonl"
    settings = ["--preset", "small", "--cluster", "cpu-2", "engine.kv_blocks=64", f"observe.traces={file}"]
    with Server(["--model", str(model), *settings], timeout_s=400) as server, Client(server.address) as client:
        client.generate([[1, 2, 3]], sampling={"temperature": 0.0}, stopping={"max_new_tokens": 4, "ignore_eos": True})
    spans = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(named(spans, "engine.step")) == 4 and len({span["context"]["trace_id"] for span in spans}) == 1
    (prompt,) = named(spans, "prompt")
    assert prompt["attributes"]["steps"] == 4 and children(spans, prompt) == ["queue", "prefill", "decode"]


def test_a_collector_that_is_not_there_holds_up_no_end() -> None:
    traces = open_traces(ObserveConfig(traces="http://127.0.0.1:9"))  # nobody listens at the port to discard
    assert traces is not None
    for _ in range(3000):  # more than wait at once
        span = begin(traces.tracer, "call", {})
        assert span is not None
        span.end(time.monotonic())
    began = time.monotonic()
    traces.close()
    assert time.monotonic() - began < 60
