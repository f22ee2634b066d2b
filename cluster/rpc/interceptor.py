"""Around every method of this protocol: bytes are parsed strictly, what is raised becomes a status by the one table.

A method therefore only decodes, calls and encodes. Cancellation is not an error and passes through: it ends the
method's stream, which ends the request in the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from cluster.rpc.errors import row_of, status_of
from cluster.rpc.proto import control_pb2, inference_pb2, training_pb2
from cluster.rpc.strict import parse

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


class Boundary(grpc.aio.ServerInterceptor):
    """Applies to this protocol's methods; health and reflection keep their own ways."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        kind = REQUEST_KINDS.get(handler_call_details.method)
        if handler is None or kind is None:
            return handler
        if handler.response_streaming:
            method: Any = bounded(handler.unary_stream, kind)
            return grpc.unary_stream_rpc_method_handler(method, response_serializer=handler.response_serializer)
        method = bounded(handler.unary_unary, kind)
        return grpc.unary_unary_rpc_method_handler(method, response_serializer=handler.response_serializer)


def bounded(method: Any, kind: type[Message]) -> Callable[[bytes, grpc.aio.ServicerContext], Awaitable[Any]]:
    """The method over raw bytes, with every error turned into a status."""

    async def call(data: bytes, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await method(parse(kind, data), context)
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
