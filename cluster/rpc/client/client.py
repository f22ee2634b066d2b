"""The client library's connection with the protocol's own messages as answers: for tests, benchmarks and whoever counts
bytes. Typed answers, asynchronous and blocking: tp_decoders.client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Self

from grpc_health.v1 import health_pb2

from cluster.rpc.client.client_messages import (
    Fields,
    Prompt,
    generate_request,
    prompt_message,
    score_request,
    train_sequences,
)
from tp_decoders.access.access import Access
from tp_decoders.access.addresses import address_of
from tp_decoders.client.errors import ServiceError
from tp_decoders.client.transport.async_connection import AsyncConnection
from tp_decoders.client.transport.link import Link, Manners
from tp_decoders.client.transport.retries import RETRY_SECONDS
from tp_decoders.protocol import control_pb2 as control
from tp_decoders.protocol import inference_pb2 as inference
from tp_decoders.protocol import training_pb2 as training

__all__ = ["AsyncClient", "Client", "Prompt", "ServiceError", "generate_request", "prompt_message", "score_request"]


class AsyncClient(AsyncConnection):
    """Calls of one server, from one event loop. `timeout` is the call's deadline in seconds, retries included; calls
    made through the stubs directly take `metadata=client.metadata`.

    Calls of Inference are sent again where the server is lost, for up to `retry_seconds` (0: never); a stream goes on
    after what was received. Those of Training and Control are made once.
    """

    def __init__(self, address: str, access: Access | None = None, retry_seconds: float = RETRY_SECONDS) -> None:
        super().__init__(Link(address_of(address), access or Access(), Manners(retry_seconds=retry_seconds)))
        self.inference, self.control = self.stubs["inference"], self.stubs["control"]
        self.training = self.stubs["training"]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def ready(self, timeout: float = 10.0) -> None:
        """Wait until the server accepts connections."""
        await super().ready(timeout)

    async def generate(
        self, prompts: Sequence[Prompt], *, timeout: float | None = None, **fields: Any
    ) -> inference.GenerateResponse:
        return await self.ask(self.inference.Generate, generate_request(prompts, **fields), timeout)

    async def stream(
        self, prompts: Sequence[Prompt], *, timeout: float | None = None, **fields: Any
    ) -> AsyncGenerator[inference.GenerateChunk]:
        """Chunks as they come; leaving the loop early cancels the call."""
        async with aclosing(self.chunks(generate_request(prompts, **fields), timeout)) as chunks:
            async for chunk in chunks:
                yield chunk

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
        answer = await self.call("health.Check", request, timeout)
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
