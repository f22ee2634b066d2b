"""The methods of Inference: decode, one call of the front-end, encode. No rule and no state lives here.

Answers may be large, so they are made as bytes, piece by piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ParamSpec

from google.protobuf.message import Message

from cluster.frontend.frontend import Frontend
from cluster.frontend.output.streams import Result, Stream, collect, raise_if_all_failed
from cluster.frontend.requests.call import Call
from cluster.frontend.requests.of_caller import of_caller, turn_of_caller
from cluster.request_errors import DoesNotFit, SlowReader
from cluster.rpc.codec import decode
from cluster.rpc.codec.encode import Encoder, texts, token_lists
from cluster.rpc.codec.encode_classify_embed import classes, embeddings
from cluster.rpc.codec.message_pieces import joined
from cluster.rpc.services.connection_limits import ServerLimits
from tp_decoders.protocol import inference_pb2 as inference
from tp_decoders.protocol.inference_pb2_grpc import InferenceServicer

if TYPE_CHECKING:
    import grpc

P = ParamSpec("P")
LARGE_ANSWER = 1024
"""Numbers in an answer from which on it is made beside the event loop."""


class Inference(InferenceServicer):
    """Generation, scoring, classification, embedding and tokenization."""

    def __init__(self, frontend: Frontend, limits: ServerLimits) -> None:
        self._frontend = frontend
        self._limits = limits

    async def Generate(self, request: inference.GenerateRequest, context: grpc.aio.ServicerContext) -> bytes:
        call = decode.generate_call(request, self._frontend.config, context.time_remaining())
        stream = await self._open(call, in_one=True)
        results = await collect(stream, len(call.prompts))
        return self._sendable(await Encoder(call, stream.request_id, self._frontend.codec).response(results))

    async def GenerateStream(self, request: inference.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        call = decode.generate_call(request, self._frontend.config, context.time_remaining())
        async with await self._open(call) as stream:
            encoder = Encoder(call, stream.request_id, self._frontend.codec)
            async for chunk in stream:
                await self._write(context, await encoder.chunk(chunk))
        raise_if_all_failed([stream.errors.get(index) for index in range(len(call.prompts))])

    async def Score(self, request: inference.ScoreRequest, context: grpc.aio.ServicerContext) -> bytes:
        call = decode.score_call(request, self._frontend.config, context.time_remaining())
        stream = await self._open(call, in_one=True)
        results = await collect(stream, len(call.prompts))
        return self._sendable(await Encoder(call, stream.request_id, self._frontend.codec).scores(results))

    async def Classify(self, request: inference.ClassifyRequest, context: grpc.aio.ServicerContext) -> bytes:
        call = decode.classify_call(request, self._frontend.config, context.time_remaining())
        stream = await self._open(call, in_one=True)
        results = await collect(stream, len(call.prompts))
        named = stream.request_id, self._frontend.limits, self._frontend.codec
        return await self._made(sum(map(_size, results)), classes, call, results, *named)

    async def Embed(self, request: inference.EmbedRequest, context: grpc.aio.ServicerContext) -> bytes:
        call = decode.embed_call(request, self._frontend.config, context.time_remaining())
        stream = await self._open(call, in_one=True)
        results = await collect(stream, len(call.prompts))
        return await self._made(sum(map(_size, results)), embeddings, results, stream.request_id)

    async def Tokenize(self, request: inference.TokenizeRequest, context: grpc.aio.ServicerContext) -> bytes:
        holds = self._limits.max_message_bytes
        ids = await self._frontend.tokenize(request.texts, turn_of_caller(), holds)
        return await self._made(sum(map(len, ids)), token_lists, ids)

    async def Detokenize(self, request: inference.DetokenizeRequest, context: grpc.aio.ServicerContext) -> bytes:
        sequences, holds = [sequence.ids for sequence in request.sequences], self._limits.max_message_bytes
        found = await self._frontend.detokenize(sequences, turn_of_caller(), holds)
        return await self._made(len(found), texts, found)

    async def _open(self, call: Call, in_one: bool = False) -> Stream:
        return await self._frontend.open(of_caller(call, self._limits.max_message_bytes if in_one else None))

    def _sendable(self, answer: bytes) -> bytes:
        """A text of very long tokens may be larger than its estimate."""
        size, most = len(answer), self._limits.max_message_bytes
        if size > most:
            raise DoesNotFit.of(
                "prompts", f"the answer has {size} bytes, a message holds {most}; ask for less at a time"
            )
        return answer

    async def _made(self, size: int, parts: Callable[P, Iterator[Message]], *args: P.args, **kwargs: P.kwargs) -> bytes:
        """An answer of its parts; of so many numbers that it is large, beside the event loop."""

        def make() -> bytes:
            return joined(parts(*args, **kwargs))

        return self._sendable(make() if size <= LARGE_ANSWER else await self._frontend.pool.run(turn_of_caller(), make))

    async def _write(self, context: grpc.aio.ServicerContext, chunk: inference.GenerateChunk) -> None:
        limit = self._limits.write_seconds
        try:
            async with asyncio.timeout(limit):
                await context.write(chunk)
        except TimeoutError as error:
            raise SlowReader(f"nothing was read from the stream for {limit:g} s; read faster, or ask again") from error


def _size(result: Result) -> int:
    """Numbers in it: tokens, what is said of each of them, states."""
    entries = [result.prompt_logprobs or (), *(chunk.logprobs for chunk in result.samples.values())]
    said = sum(len(some) * (len(some[0].top) + 1) for some in entries if some)
    pooled = (chunk.pooled for chunk in result.samples.values() if chunk.pooled)
    return said + sum(len(c.token_ids) for c in result.samples.values()) + sum(len(p) * len(p[0]) for p in pooled)
