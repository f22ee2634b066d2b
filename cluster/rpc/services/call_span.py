"""The span of a gRPC call: begun with the caller's W3C trace context, ended with the call's status."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
from opentelemetry.trace import Tracer

from cluster.frontend.call_traces import SPAN, Value, begin

HEADERS = ("traceparent", "tracestate")
"""All that is taken of a call's metadata."""
Method = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


def traced(inner: Method, tracer: Tracer | None, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Method:
    """The method, with a span around it where the call is sampled."""
    if tracer is None:
        return inner
    service, _, name = method.strip("/").partition("/")
    headers = {key: value for key, value in metadata if key in HEADERS and isinstance(value, str)}

    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        values: dict[str, Value] = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        span = begin(tracer, f"{service}/{name}", headers, values)
        if span is None:
            return await inner(request, context)
        SPAN.set(span)  # of this call's own task
        code = grpc.StatusCode.OK
        try:
            return await inner(request, context)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except BaseException:
            code = status_code(context)
            raise
        finally:
            error = "" if code is grpc.StatusCode.OK else code.name
            span.end(time.monotonic(), {"rpc.grpc.status_code": code.value[0]}, error=error)

    return call


def status_code(context: Any) -> grpc.StatusCode:
    """What an ended call was told."""
    given = context.code()
    return next((code for code in grpc.StatusCode if given in (code, code.value[0])), grpc.StatusCode.UNKNOWN)
