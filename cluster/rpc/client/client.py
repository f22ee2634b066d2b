"""A small client, asynchronous and blocking, for the command line, benchmarks and tests; answers are protocol messages.

Errors of gRPC become one readable ServiceError that carries the status and its google.rpc details. Calls of Inference
outlive a server that is started again (retries.py); those of Training and Control are made once. No pooling.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import Any, Self

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.access.access_config import Access
from cluster.rpc.client.client_messages import (
    Fields,
    Prompt,
    generate_request,
    prompt_message,
    score_request,
    train_sequences,
)
from cluster.rpc.client.connection_hints import advice
from cluster.rpc.client.retries import RETRY_SECONDS, Continued, Patience
from cluster.rpc.client.service_error import ServiceError
from cluster.rpc.proto import control_pb2 as control
from cluster.rpc.proto import inference_pb2 as inference
from cluster.rpc.proto import training_pb2 as training
from cluster.rpc.proto.control_pb2_grpc import ControlStub
from cluster.rpc.proto.inference_pb2_grpc import InferenceStub
from cluster.rpc.proto.training_pb2_grpc import TrainingStub
from cluster.rpc.tls import call_metadata, channel, host_of

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 200),  # grpc's own goes up to two minutes: a server that is back sooner
    ("grpc.max_reconnect_backoff_ms", 2000),  # would not be noticed
)
__all__ = ["AsyncClient", "Client", "Prompt", "ServiceError", "generate_request", "prompt_message", "score_request"]


class AsyncClient:
    """Calls of one server, from one event loop. `timeout` is the call's deadline in seconds, retries included; calls
    made through the stubs directly take `metadata=client.metadata`.

    Each call of Inference has a request_id, made here unless given. Where the server is lost (UNAVAILABLE) the call is
    sent again under it for up to `retry_seconds` without an answer; 0: never. A server that has not answered this
    client once is not waited for. A stream goes on after what was received: no token, no text twice. That needs the
    same answer again: from a server with a state_dir, or by the same seed, or greedy. Where the answer does not begin
    with what was received under the same seed, the loss of the server is raised as it was.
    """

    def __init__(self, address: str, access: Access | None = None, retry_seconds: float = RETRY_SECONDS) -> None:
        access = access or Access()
        self._retry_seconds = retry_seconds
        self._met = False  # whether the server has ever answered
        self._address, self._host, self._encrypted = address, host_of(address), access.encrypted
        self.metadata = call_metadata(access)
        self.channel = channel(address, access, OPTIONS)
        self.inference = InferenceStub(self.channel)
        self.control = ControlStub(self.channel)
        self.training = TrainingStub(self.channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.channel.close(None)

    async def ready(self, timeout: float = 10.0) -> None:
        """Wait until the server accepts connections."""
        try:
            async with asyncio.timeout(timeout):
                await self.channel.channel_ready()
                self._met = True
        except TimeoutError as error:
            text = f"{self._address}: no server answered within {timeout:g} s; is it running, and is the address right?"
            text = "; ".join(filter(None, (text, advice(self._host, self._encrypted))))
            raise ServiceError(text) from error

    async def call(self, method: Any, request: Message, timeout: float | None = None) -> Any:
        """Any unary method of the stubs, once."""
        try:
            answer = await method(request, timeout=timeout, metadata=self.metadata)
        except grpc.RpcError as error:
            raise self._heard(error) from error
        self._met = True
        return answer

    async def ask(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        """A unary method of Inference, again and again under one request_id where the server is lost."""
        request.request_id = request.request_id or uuid.uuid4().hex
        patience = Patience(self._retry_seconds, timeout)
        while True:
            try:
                return await self.call(method, request, patience.time_left())
            except ServiceError as error:
                await patience.outlive(error, self._met)

    async def generate(
        self, prompts: Sequence[Prompt], *, timeout: float | None = None, **fields: Any
    ) -> inference.GenerateResponse:
        return await self.ask(self.inference.Generate, generate_request(prompts, **fields), timeout)

    async def stream(
        self, prompts: Sequence[Prompt], *, timeout: float | None = None, **fields: Any
    ) -> AsyncGenerator[inference.GenerateChunk]:
        """Chunks as they come; leaving the loop early cancels the call."""
        request = generate_request(prompts, **fields)
        request.request_id = request.request_id or uuid.uuid4().hex
        patience, continued = Patience(self._retry_seconds, timeout), Continued()
        while True:
            call = self.inference.GenerateStream(request, timeout=patience.time_left(), metadata=self.metadata)
            try:
                async for chunk in call:
                    self._met = True
                    patience.rest()
                    if (news := continued.news(chunk)) is not None:
                        yield news
                return
            except grpc.RpcError as error:
                lost = self._heard(error)
                await patience.outlive(lost, self._met)
                continued.begin_again(lost)
            finally:
                call.cancel()

    def _heard(self, error: grpc.RpcError) -> ServiceError:
        """With what may be in the way, where it is not the server that has spoken."""
        lost = error.code() is grpc.StatusCode.UNAVAILABLE and not self._met
        heard = ServiceError.of(error, advice(self._host, self._encrypted, error.details() or "") if lost else "")
        self._met |= bool(heard.reason)
        return heard

    async def score(
        self, sequences: Sequence[Prompt], *, timeout: float | None = None, **fields: Any
    ) -> inference.ScoreResponse:
        return await self.ask(self.inference.Score, score_request(sequences, **fields), timeout)

    async def classify(
        self, sequences: Sequence[Prompt], *, timeout: float | None = None, **fields: Any
    ) -> inference.ClassifyResponse:
        request = inference.ClassifyRequest(sequences=map(prompt_message, sequences), **fields)
        return await self.ask(self.inference.Classify, request, timeout)

    async def embed(
        self, sequences: Sequence[Prompt], *, timeout: float | None = None, **fields: Any
    ) -> inference.EmbedResponse:
        request = inference.EmbedRequest(sequences=map(prompt_message, sequences), **fields)
        return await self.ask(self.inference.Embed, request, timeout)

    async def tokenize(self, texts: Sequence[str], timeout: float | None = None) -> inference.TokenizeResponse:
        return await self.call(self.inference.Tokenize, inference.TokenizeRequest(texts=texts), timeout)

    async def detokenize(
        self, sequences: Sequence[Sequence[int]], timeout: float | None = None
    ) -> inference.DetokenizeResponse:
        request = inference.DetokenizeRequest(sequences=[inference.TokenIds(ids=ids) for ids in sequences])
        return await self.call(self.inference.Detokenize, request, timeout)

    async def train_step(
        self, sequences: Sequence[Sequence[int] | Fields], *, timeout: float | None = None, **fields: Any
    ) -> training.TrainStepResponse:
        request = training.TrainStepRequest(sequences=train_sequences(sequences), **fields)
        return await self.call(self.training.TrainStep, request, timeout)

    async def forward_backward(
        self, sequences: Sequence[Sequence[int] | Fields], *, timeout: float | None = None, **fields: Any
    ) -> training.ForwardBackwardResponse:
        request = training.ForwardBackwardRequest(sequences=train_sequences(sequences), **fields)
        return await self.call(self.training.ForwardBackward, request, timeout)

    async def optim_step(self, *, timeout: float | None = None, **fields: Any) -> training.OptimStepResponse:
        return await self.call(self.training.OptimStep, training.OptimStepRequest(**fields), timeout)

    async def evaluate(
        self, sequences: Sequence[Sequence[int] | Fields], *, timeout: float | None = None, **fields: Any
    ) -> training.EvaluateResponse:
        request = training.EvaluateRequest(sequences=train_sequences(sequences), **fields)
        return await self.call(self.training.Evaluate, request, timeout)

    async def save_state(self, name: str, *, timeout: float | None = None, **fields: Any) -> training.SaveStateResponse:
        return await self.call(self.training.SaveState, training.SaveStateRequest(name=name, **fields), timeout)

    async def load_state(self, name: str, *, timeout: float | None = None, **fields: Any) -> training.LoadStateResponse:
        return await self.call(self.training.LoadState, training.LoadStateRequest(name=name, **fields), timeout)

    async def export(self, name: str, *, timeout: float | None = None, **fields: Any) -> training.ExportResponse:
        return await self.call(self.training.Export, training.ExportRequest(name=name, **fields), timeout)

    async def train_state(self, timeout: float | None = None) -> training.TrainState:
        return await self.call(self.training.GetTrainState, training.GetTrainStateRequest(), timeout)

    async def drop_gradients(self, timeout: float | None = None, **fields: Any) -> training.DropGradientsResponse:
        return await self.call(self.training.DropGradients, training.DropGradientsRequest(**fields), timeout)

    async def server_info(self, timeout: float | None = None) -> control.ServerInfo:
        return await self.call(self.control.GetServerInfo, control.GetServerInfoRequest(), timeout)

    async def model_info(self, timeout: float | None = None) -> control.ModelInfo:
        return await self.call(self.control.GetModelInfo, control.GetModelInfoRequest(), timeout)

    async def health(self, service: str = "", timeout: float | None = None) -> str:
        """What grpc.health.v1 says of a service, as in SERVING."""
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await self.call(health_pb2_grpc.HealthStub(self.channel).Check, request, timeout)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    async def load(self, timeout: float | None = None) -> control.Load:
        return await self.call(self.control.GetLoad, control.GetLoadRequest(), timeout)

    async def abort(self, request_ids: Sequence[str], timeout: float | None = None) -> int:
        request = control.AbortRequest(request_ids=request_ids)
        return (await self.call(self.control.Abort, request, timeout)).aborted

    async def drain(self, grace_seconds: float, timeout: float | None = None) -> int:
        request = control.DrainRequest(grace_seconds=grace_seconds)
        return (await self.call(self.control.Drain, request, timeout)).aborted


class Client:
    """The same calls, blocking: for command lines and scripts. Not for use inside an event loop."""

    def __init__(self, address: str, access: Access | None = None, retry_seconds: float = RETRY_SECONDS) -> None:
        self._runner = asyncio.Runner()
        self._calls = self._runner.run(_make(address, access, retry_seconds))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._runner.run(self._calls.close())
        self._runner.close()

    def ready(self, timeout: float = 10.0) -> None:
        self._runner.run(self._calls.ready(timeout))

    def generate(self, prompts: Sequence[Prompt], **fields: Any) -> inference.GenerateResponse:
        return self._runner.run(self._calls.generate(prompts, **fields))

    def stream(self, prompts: Sequence[Prompt], **fields: Any) -> Iterator[inference.GenerateChunk]:
        chunks = self._calls.stream(prompts, **fields)
        try:
            while (chunk := self._runner.run(_next(chunks))) is not None:
                yield chunk
        finally:
            self._runner.run(chunks.aclose())

    def score(self, sequences: Sequence[Prompt], **fields: Any) -> inference.ScoreResponse:
        return self._runner.run(self._calls.score(sequences, **fields))

    def classify(self, sequences: Sequence[Prompt], **fields: Any) -> inference.ClassifyResponse:
        return self._runner.run(self._calls.classify(sequences, **fields))

    def embed(self, sequences: Sequence[Prompt], **fields: Any) -> inference.EmbedResponse:
        return self._runner.run(self._calls.embed(sequences, **fields))

    def tokenize(self, texts: Sequence[str]) -> inference.TokenizeResponse:
        return self._runner.run(self._calls.tokenize(texts))

    def detokenize(self, sequences: Sequence[Sequence[int]]) -> inference.DetokenizeResponse:
        return self._runner.run(self._calls.detokenize(sequences))

    def train_step(self, sequences: Sequence[Sequence[int] | Fields], **fields: Any) -> training.TrainStepResponse:
        return self._runner.run(self._calls.train_step(sequences, **fields))

    def forward_backward(
        self, sequences: Sequence[Sequence[int] | Fields], **fields: Any
    ) -> training.ForwardBackwardResponse:
        return self._runner.run(self._calls.forward_backward(sequences, **fields))

    def optim_step(self, **fields: Any) -> training.OptimStepResponse:
        return self._runner.run(self._calls.optim_step(**fields))

    def evaluate(self, sequences: Sequence[Sequence[int] | Fields], **fields: Any) -> training.EvaluateResponse:
        return self._runner.run(self._calls.evaluate(sequences, **fields))

    def save_state(self, name: str, **fields: Any) -> training.SaveStateResponse:
        return self._runner.run(self._calls.save_state(name, **fields))

    def load_state(self, name: str, **fields: Any) -> training.LoadStateResponse:
        return self._runner.run(self._calls.load_state(name, **fields))

    def export(self, name: str, **fields: Any) -> training.ExportResponse:
        return self._runner.run(self._calls.export(name, **fields))

    def train_state(self) -> training.TrainState:
        return self._runner.run(self._calls.train_state())

    def drop_gradients(self, **fields: Any) -> training.DropGradientsResponse:
        return self._runner.run(self._calls.drop_gradients(**fields))

    def server_info(self) -> control.ServerInfo:
        return self._runner.run(self._calls.server_info())

    def model_info(self) -> control.ModelInfo:
        return self._runner.run(self._calls.model_info())

    def load(self) -> control.Load:
        return self._runner.run(self._calls.load())

    def abort(self, request_ids: Sequence[str]) -> int:
        return self._runner.run(self._calls.abort(request_ids))

    def drain(self, grace_seconds: float) -> int:
        return self._runner.run(self._calls.drain(grace_seconds))


async def _make(address: str, access: Access | None, retry_seconds: float) -> AsyncClient:
    """The channel belongs to the loop it is made in."""
    return AsyncClient(address, access, retry_seconds)


async def _next(chunks: AsyncIterator[inference.GenerateChunk]) -> inference.GenerateChunk | None:
    return await anext(chunks, None)
