"""The HTTP server of a resolved configuration, beside its gRPC server: the same door, limits, health and metrics."""

from __future__ import annotations

import asyncio
from pathlib import Path

from opentelemetry.trace import Tracer
from prometheus_client.registry import Collector

from cluster.frontend.frontend import Frontend
from cluster.frontend.readiness import Readiness
from cluster.http.routes import Api
from cluster.http.served_model import served_model
from cluster.http.server import HttpServer
from cluster.rpc.services.control_service import ServiceInfo
from cluster.rpc.services.door import Door
from launch.observe.metrics_server import exposition
from launch.serving.resolve_serve import Endpoint, ResolvedServe


async def open_http(
    server: ResolvedServe,
    endpoint: Endpoint,
    frontend: Frontend,
    info: ServiceInfo,
    readiness: Readiness,
    numbers: Collector,
    door: Door,
    tracer: Tracer | None,
) -> HttpServer:
    """Listening. The checkpoint's files are read beside the event loop."""
    folder, eos = Path(server.program.model), frontend.limits.eos_token_ids
    model = await asyncio.to_thread(served_model, info, folder, eos, frontend.codec, server.chat_template)
    api = Api(frontend, model, server.limits, readiness, exposition(numbers))
    http = HttpServer(
        api,
        endpoint.host,
        endpoint.port,
        limits=server.limits,
        security=endpoint.security,
        door=door,
        tracer=tracer,
    )
    await http.start()
    return http
