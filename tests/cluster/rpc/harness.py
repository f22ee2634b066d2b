"""A real gRPC server on a real local port, over a front-end and a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo

from cluster.access.access_config import Access, Security
from cluster.frontend.frontend import Frontend
from cluster.frontend.output.output_text import TextCodec
from cluster.rpc.client.client import AsyncClient, ServiceError
from cluster.rpc.server import Server, build_server
from cluster.rpc.services.connection_limits import ServerLimits
from cluster.rpc.services.control_service import ServiceInfo
from tests.cluster.frontend.fakes import CODEC, FakeEngine
from tests.cluster.frontend.harness import serving

INFERENCE = "/tp_decoders.v1.Inference/"
CONTROL = "/tp_decoders.v1.Control/"


@dataclass
class Service:
    """Everything of one running service."""

    engine: FakeEngine
    frontend: Frontend
    server: Server
    client: AsyncClient

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def raw(self, method: str, data: bytes, timeout: float = 120.0) -> bytes:
        """Any bytes to any method."""
        channel: Any = self.client.channel
        answer: bytes = await channel.unary_unary(method)(data, timeout=timeout)
        return answer


@asynccontextmanager
async def service(
    engine: FakeEngine | None = None,
    codec: TextCodec | None = CODEC,
    limits: ServerLimits | None = None,
    security: Security | None = None,
    access: Access | None = None,
    ready: bool = True,
    retry_seconds: float = 0.0,
    **config: Any,
) -> AsyncIterator[Service]:
    engine = engine or FakeEngine()
    async with serving(engine, codec, **config) as frontend:
        info = ServiceInfo(model_id="fake", family="none", tensor_parallel_size=2)
        server = build_server(frontend, "127.0.0.1:0", limits, info, security)
        await server.start()
        try:
            async with AsyncClient(f"127.0.0.1:{server.port}", access, retry_seconds) as client:
                if ready:  # a client without what the server asks for never is
                    await client.ready(60.0)
                yield Service(engine, frontend, server, client)
        finally:
            await server.stop(1.0)


async def refused(awaitable: Any, code: grpc.StatusCode, words: str) -> ServiceError:
    """The error of a call that must fail with this status and these words."""
    with pytest.raises(ServiceError) as caught:
        await awaitable
    assert caught.value.code is code, caught.value
    assert words in str(caught.value)
    return caught.value


def info(error: ServiceError) -> ErrorInfo:
    return next(detail for detail in error.details if isinstance(detail, ErrorInfo))
