"""The methods of the protocol: decode, one call of the front-end, encode. No rule and no state lives here."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING

from cluster.engine.request import EngineLoad
from cluster.frontend.calls import Call
from cluster.frontend.errors import InvalidRequest, SlowReader, Violation
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.readiness import Readiness
from cluster.frontend.streams import Stream, collect, raise_if_all_failed
from cluster.rpc import decode
from cluster.rpc.auth_limits import CALLER
from cluster.rpc.encode import Encoder, texts, token_lists
from cluster.rpc.encode_readings import classes, embeddings
from cluster.rpc.limits import ServerLimits
from cluster.rpc.proto import control_pb2 as control
from cluster.rpc.proto import inference_pb2 as inference
from cluster.rpc.proto.control_pb2_grpc import ControlServicer
from cluster.rpc.proto.inference_pb2_grpc import InferenceServicer
from tp_decoders.task_config import CAUSAL

if TYPE_CHECKING:
    import grpc

API_VERSION = "tp_decoders.v1"
DEFAULT_GRACE_SECONDS = 30.0
MAX_GRACE_SECONDS = 86400.0

STATES = {
    State.STARTING: control.SERVING_STATE_UNSPECIFIED,
    State.SERVING: control.SERVING_STATE_SERVING,
    State.RECOVERING: control.SERVING_STATE_RECOVERING,
    State.DRAINING: control.SERVING_STATE_DRAINING,
    State.FAILED: control.SERVING_STATE_FAILED,
    State.CLOSED: control.SERVING_STATE_CLOSED,
}


@dataclass(frozen=True, kw_only=True)
class ServiceInfo:
    """What is served, in words for GetServerInfo and GetModelInfo."""

    model_id: str = ""
    family: str = ""
    dtype: str = ""
    device: str = ""
    numerics: str = ""
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1


class Inference(InferenceServicer):
    """Generation, scoring, classification, embedding and tokenization."""

    def __init__(self, frontend: Frontend, limits: ServerLimits) -> None:
        self._frontend = frontend
        self._limits = limits

    async def Generate(
        self, request: inference.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> inference.GenerateResponse:
        call = decode.generate_call(request, self._frontend.config, context.time_remaining())
        stream = await self._open(call)
        results = await collect(stream, len(call.prompts))
        return Encoder(call, stream.request_id, self._frontend.codec).response(results)

    async def GenerateStream(self, request: inference.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        call = decode.generate_call(request, self._frontend.config, context.time_remaining())
        async with await self._open(call) as stream:
            encoder = Encoder(call, stream.request_id, self._frontend.codec)
            async for chunk in stream:
                await self._write(context, encoder.chunk(chunk))
        raise_if_all_failed([stream.errors.get(index) for index in range(len(call.prompts))])

    async def Score(
        self, request: inference.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> inference.ScoreResponse:
        call = decode.score_call(request, self._frontend.config, context.time_remaining())
        stream = await self._open(call)
        results = await collect(stream, len(call.prompts))
        return Encoder(call, stream.request_id, self._frontend.codec).scores(results)

    async def Classify(
        self, request: inference.ClassifyRequest, context: grpc.aio.ServicerContext
    ) -> inference.ClassifyResponse:
        call = decode.classify_call(request, self._frontend.config, context.time_remaining())
        stream = await self._open(call)
        results = await collect(stream, len(call.prompts))
        return classes(call, results, stream.request_id, self._frontend.limits, self._frontend.codec)

    async def Embed(
        self, request: inference.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> inference.EmbedResponse:
        call = decode.embed_call(request, self._frontend.config, context.time_remaining())
        stream = await self._open(call)
        results = await collect(stream, len(call.prompts))
        return embeddings(results, stream.request_id)

    async def Tokenize(
        self, request: inference.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference.TokenizeResponse:
        return token_lists(await self._frontend.tokenize(request.texts))

    async def Detokenize(
        self, request: inference.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference.DetokenizeResponse:
        return texts(self._frontend.detokenize([sequence.ids for sequence in request.sequences]))

    async def _open(self, call: Call) -> Stream:
        return await self._frontend.open(replace(call, account=CALLER.get()))

    async def _write(self, context: grpc.aio.ServicerContext, chunk: inference.GenerateChunk) -> None:
        limit = self._limits.write_seconds
        try:
            async with asyncio.timeout(limit):
                await context.write(chunk)
        except TimeoutError as error:
            raise SlowReader(f"nothing was read from the stream for {limit:g} s; read faster, or ask again") from error


class Control(ControlServicer):
    """What runs, how busy it is, and how to stop things."""

    def __init__(
        self, frontend: Frontend, limits: ServerLimits, info: ServiceInfo, readiness: Readiness | None = None
    ) -> None:
        self._frontend = frontend
        self._readiness = readiness
        self._limits = limits
        self._info = info
        self._started = time.monotonic()

    async def GetServerInfo(
        self, request: control.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> control.ServerInfo:
        info, config = self._info, self._frontend.config
        serving = self._frontend.state is State.SERVING
        return control.ServerInfo(
            server_version=_version(),
            api_version=API_VERSION,
            state=STATES[self._frontend.state],
            parallelism=control.ParallelismInfo(
                tensor_parallel_size=info.tensor_parallel_size, data_parallel_size=info.data_parallel_size
            ),
            uptime_seconds=time.monotonic() - self._started,
            fault=self._frontend.fault_cause,
            max_open_requests=config.max_open_requests,
            max_prompts_per_call=config.max_prompts_per_call,
            max_n=config.max_n,
            max_logprobs=config.max_logprobs,
            max_message_bytes=self._limits.max_message_bytes,
            ready=serving if self._readiness is None else self._readiness.ready,
            not_ready="" if self._readiness is None else self._readiness.reason,
            restarts=self._frontend.restarts,
        )

    async def GetModelInfo(
        self, request: control.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> control.ModelInfo:
        info, limits = self._info, self._frontend.limits
        return control.ModelInfo(
            model_id=info.model_id,
            family=info.family,
            dtype=info.dtype,
            device=info.device,
            numerics=info.numerics,
            vocab_size=limits.vocab_size,
            max_context=limits.max_context,
            kv_capacity_tokens=limits.kv_capacity_tokens,
            eos_token_ids=limits.eos_token_ids,
            supports_text_input=self._frontend.codec is not None,
            supports_token_ids_input=True,
            task=limits.task.name if limits.task else CAUSAL,
            labels=limits.task.labels if limits.task else (),
        )

    async def GetLoad(self, request: control.GetLoadRequest, context: grpc.aio.ServicerContext) -> control.Load:
        return load_message(await self._frontend.load(), self._frontend.num_open)

    async def Abort(self, request: control.AbortRequest, context: grpc.aio.ServicerContext) -> control.AbortResponse:
        return control.AbortResponse(aborted=self._frontend.abort(request.request_ids))

    async def Drain(self, request: control.DrainRequest, context: grpc.aio.ServicerContext) -> control.DrainResponse:
        grace = request.grace_seconds if request.HasField("grace_seconds") else DEFAULT_GRACE_SECONDS
        if not 0 <= grace <= MAX_GRACE_SECONDS:
            rule = f"{grace!r} is not allowed; give seconds from 0 to {MAX_GRACE_SECONDS:g}"
            raise InvalidRequest.of([Violation("grace_seconds", rule)])
        return control.DrainResponse(aborted=await self._frontend.drain(grace))


def load_message(load: EngineLoad, open_requests: int) -> control.Load:
    """The engine's counters, and what the front-end holds."""
    seconds = load.collective_seconds
    nested = {
        "ranks": [control.RankReport(**vars(report)) for report in load.ranks],
        "collectives": [
            control.CollectiveCount(kind=kind, count=count, bytes=nbytes, seconds=seconds.get(kind, 0.0))
            for kind, (count, nbytes) in sorted(load.collectives.items())
        ],
    }
    plain = {name: value for name, value in vars(load).items() if name != "collective_seconds"}
    return control.Load(**{**plain, **nested}, open_requests=open_requests)


def _version() -> str:
    try:
        return metadata.version("tp-decoders")
    except metadata.PackageNotFoundError:
        return "unpackaged"
