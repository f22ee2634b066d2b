"""Around every method: who calls is known before a message is read, how much a client may have open is counted; bytes
are parsed strictly, and what is raised becomes a status by the one table.

A method therefore only decodes, calls and encodes. Cancellation is not an error and passes through: it ends the
method's stream, which ends the request in the engine. Health and reflection pass the gate and are counted, the rest
of them is their own.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, suppress
from typing import Any

import grpc
from google.protobuf.message import Message
from opentelemetry.trace import Tracer

from cluster.access.access_errors import SlowSender
from cluster.access.caller_limits import Account
from cluster.access.callers import answering, client_of, name_of
from cluster.access.roles import Gate
from cluster.frontend.requests.call import FrontendConfig
from cluster.frontend.requests.of_caller import turn_of_caller
from cluster.frontend.requests.offload import FairThreadPool
from cluster.request_errors import SlowReader
from cluster.rpc.codec.error_status import row_of, status_of
from cluster.rpc.codec.range_check import RangeCheck
from cluster.rpc.codec.strict_parsing import parse
from cluster.rpc.services.call_span import traced
from cluster.rpc.services.connection_limits import ServerLimits
from cluster.rpc.services.door import Door, gate_door
from cluster.rpc.services.unsent_answers import Bounds, UnsentAnswers
from parallel.errors import RequestError, TpError
from tp_decoders.protocol import control_pb2, inference_pb2, training_pb2

log = logging.getLogger(__name__)

SERVICES = tuple(
    service
    for module in (inference_pb2, control_pb2, training_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
)
REQUEST_KINDS: dict[str, type[Message]] = {
    f"/{service.full_name}/{method.name}": method.input_type._concrete_class
    for service in SERVICES
    for method in service.methods
}
LARGE_MESSAGE_BYTES = 64 * 1024
"""Larger ones are parsed beside the event loop."""
Call = Callable[[Any, grpc.aio.ServicerContext], Any]


class Interceptor(grpc.aio.ServerInterceptor):
    """Strictness and the table of errors apply to this protocol's methods, the gate and the counting to all."""

    def __init__(
        self,
        door: Door | None = None,
        limits: ServerLimits | None = None,
        tracer: Tracer | None = None,
        config: FrontendConfig | None = None,
        pool: FairThreadPool | None = None,
    ) -> None:
        limits = limits or ServerLimits()
        self._tracer = tracer
        self._ranges = RangeCheck(config or FrontendConfig())
        door = gate_door(Gate(None), limits) if door is None else door
        self._gate, self._open, self._open_to_all = door.gate, door.open, door.open_to_all
        bounds = limits.max_message_bytes, limits.max_unread_bytes_per_client, limits.max_unread_bytes
        self._unsent = UnsentAnswers(Bounds(*bounds, limits.write_seconds))
        self._pool = pool or FairThreadPool()
        self._receive_seconds = limits.receive_seconds

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        try:
            account = self._gate.enter(method, handler_call_details.invocation_metadata)
        except TpError as error:
            log.info("%s was refused: %s", method, error)
            return refusal(error)
        kind = REQUEST_KINDS.get(method)
        if kind is None:
            function = self._among_open(_function(handler), account)
            return _handler(handler.request_streaming, handler, function, handler.request_deserializer)
        inner = received(bounded(_function(handler), kind, self._ranges, self._pool), self._receive_seconds)
        inner = traced(inner, self._tracer, method, handler_call_details.invocation_metadata)
        inner = inner if handler.response_streaming else serialized(inner)
        method_of_bytes: Any = self._counted(inner, account)
        return grpc.stream_stream_rpc_method_handler(
            method_of_bytes, None, handler.response_serializer if handler.response_streaming else None
        )  # streams, to be counted before anything is read, and until everything is sent

    def _counted(self, inner: Call, account: Account | None) -> Call:
        """The method, as one of its client's open calls until its answer has been sent."""

        async def call(request: Any, context: grpc.aio.ServicerContext) -> None:
            answering(account, _name(account, context), context.peer())
            client = _client(account, context)
            try:
                with ExitStack() as held:
                    held.enter_context(self._open.one_of(client, None if account is None else account.grant.calls))
                    answer = await inner(request, context)
                    if answer is not None:
                        await self._unsent.send(context, client, answer, held)
            except SlowReader as error:
                with suppress(grpc.aio.InternalError):  # stuck behind what is not read until the client goes
                    await fail(context, error)
            except TpError as error:
                await fail(context, error)

        return call

    def _among_open(self, inner: Call, account: Account | None) -> Call:
        """A method of health or reflection: its places are its own, so that nobody without a token takes others'."""

        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                with self._open_to_all.one_of(_client(account, context)):
                    return await inner(request, context)
            except TpError as error:
                await fail(context, error)

        async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            try:
                with self._open_to_all.one_of(_client(account, context)):
                    async for answer in inner(request, context):
                        yield answer
            except TpError as error:
                await fail(context, error)

        return stream if inspect.isasyncgenfunction(inner) else call


def _name(account: Account | None, context: Any) -> str:
    names = list(context.auth_context().get("x509_common_name", ())) if context.peer_identities() else []
    return name_of(account, names[0].decode(errors="replace") if names else None)


def _client(account: Account | None, context: Any) -> str:
    return client_of(_name(account, context), context.peer())


def _function(handler: Any) -> Call:
    kind = (handler.request_streaming, handler.response_streaming)
    names = {
        (False, False): "unary_unary", (False, True): "unary_stream",
        (True, False): "stream_unary", (True, True): "stream_stream",
    }  # fmt: skip
    found: Call = getattr(handler, names[kind])
    return found


def _handler(request_streaming: bool, like: Any, function: Any, deserializer: Any = None) -> grpc.RpcMethodHandler:
    """Another function in the place of a handler's. What streams looks the same on the wire."""
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler, (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler, (True, True): grpc.stream_stream_rpc_method_handler,
    }[request_streaming, like.response_streaming]  # fmt: skip
    made: grpc.RpcMethodHandler = make(function, deserializer, like.response_serializer)
    return made


def serialized(inner: Call) -> Call:
    """The answer as bytes, which large ones are already."""

    async def call(request: Any, context: grpc.aio.ServicerContext) -> bytes:
        answer: Message | bytes = await inner(request, context)
        return answer if isinstance(answer, bytes) else answer.SerializeToString()

    return call


def refusal(error: TpError) -> grpc.RpcMethodHandler:
    """Answers with the error. As a stream that nobody reads, so that not even the message is taken in."""

    async def call(requests: Any, context: grpc.aio.ServicerContext) -> None:
        await fail(context, error)

    function: Any = call
    return grpc.stream_unary_rpc_method_handler(function)


def received(method: Call, seconds: float) -> Call:
    """The method over the one message of a call, for which the client has so many seconds."""

    async def call(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
        try:
            async with asyncio.timeout(seconds):
                data = await anext(aiter(messages), None)
        except TimeoutError as error:
            raise SlowSender(f"no message came within {seconds:g} s; send it, then wait for the answer") from error
        if data is None:
            raise RequestError("the call ended without a message; send one, even if it is empty")
        return await method(data, context)

    return call


def bounded(
    method: Any, kind: type[Message], ranges: RangeCheck, pool: FairThreadPool
) -> Callable[[bytes, grpc.aio.ServicerContext], Awaitable[Any]]:
    """The method over raw bytes, whose fields are in their ranges, with every error turned into a status."""

    async def call(data: bytes, context: grpc.aio.ServicerContext) -> Any:
        def read() -> Message:
            message = parse(kind, data)
            ranges.check(message)
            return message

        try:
            large = len(data) > LARGE_MESSAGE_BYTES
            message = await pool.run(turn_of_caller(), read) if large else read()
            return await method(message, context)
        except Exception as error:  # noqa: BLE001 (the boundary: everything becomes a status)
            await fail(context, error)

    return call


async def fail(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """End the call with the error's status and details."""
    row, status = row_of(error), status_of(error)
    if row.code is grpc.StatusCode.INTERNAL:
        log.error("a call failed: %s", status.message, exc_info=error)
    details = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(row.code, status.message, details)
