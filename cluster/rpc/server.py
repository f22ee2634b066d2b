"""The gRPC server over a front-end: services, TLS, tokens, health, reflection, limits, graceful stop.

Health follows the front-end: `Inference` and `Training` (and the whole server, "") serve while new requests are
admitted and the last canary came back (readiness); `Control` until the end (liveness).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry.trace import Tracer

from cluster.access.access_config import Security, is_loopback
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.readiness import Readiness
from cluster.rpc.services.connection_limits import ServerLimits
from cluster.rpc.services.control_service import Control, Restart, ServiceInfo
from cluster.rpc.services.door import Door, door_of
from cluster.rpc.services.inference_service import Inference
from cluster.rpc.services.interceptor import SERVICES, Interceptor
from cluster.rpc.services.training_service import Training
from cluster.rpc.services.unknown_methods import make_server
from cluster.rpc.tls import ServerCertificates
from parallel.errors import ConfigError
from tp_decoders.protocol import control_pb2_grpc, inference_pb2_grpc, training_pb2_grpc

INFERENCE, CONTROL, TRAINING = (service.full_name for service in SERVICES)

log = logging.getLogger(__name__)


class Server:
    """Make it with `build_server`; `start`, then `stop`."""

    def __init__(
        self,
        server: grpc.aio.Server,
        frontend: Frontend,
        address: str,
        certificates: ServerCertificates | None = None,
        readiness: Readiness | None = None,
    ) -> None:
        self._server = server
        self._health = _health_servicer()
        self._tasks: set[asyncio.Task[None]] = set()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            self.port = _add_port(server, address, certificates)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: {error}; give a free port, or 0 for any") from error
        self._state, self._ready = frontend.state, readiness is None
        frontend.observe(self._follow)
        if readiness is not None:
            readiness.observe(self._follow_readiness)

    async def start(self) -> None:
        await self._server.start()

    async def stop(self, grace: float = 5.0) -> None:
        """Refuse new calls, give running ones `grace` seconds, then end them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)

    async def wait(self) -> None:
        """Until the server has stopped."""
        await self._server.wait_for_termination()

    def _follow(self, state: State) -> None:
        self._state = state
        self._tell_health()

    def _follow_readiness(self, ready: bool) -> None:
        self._ready = ready
        self._tell_health()

    def _tell_health(self) -> None:
        """Health answers soon after the front-end changes state; changes keep their order."""
        task = asyncio.get_running_loop().create_task(self._set_health(self._state, self._ready))
        self._tasks.add(task)
        task.add_done_callback(self._health_told)

    def _health_told(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("health could not be told of a change", exc_info=error)

    async def _set_health(self, state: State, ready: bool) -> None:
        kinds = health_pb2.HealthCheckResponse
        admits = kinds.SERVING if state is State.SERVING and ready else kinds.NOT_SERVING
        answers = kinds.NOT_SERVING if state is State.CLOSED else kinds.SERVING
        for name, status in (("", admits), (INFERENCE, admits), (TRAINING, admits), (CONTROL, answers)):
            await self._health.set(name, status)


def _add_port(server: grpc.aio.Server, address: str, certificates: ServerCertificates | None) -> int:
    if certificates is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, certificates.credentials())


def _health_servicer() -> Any:
    """health.aio is made when grpc.aio is there, which no stub knows."""
    return vars(health)["aio"].HealthServicer()


def build_server(
    frontend: Frontend,
    address: str,
    limits: ServerLimits | None = None,
    info: ServiceInfo | None = None,
    security: Security | None = None,
    readiness: Readiness | None = None,
    restart: Restart | None = None,
    tracer: Tracer | None = None,
    door: Door | None = None,
) -> Server:
    """A server over a front-end, bound to `address` ("host:port", port 0: any; see `.port`) and not yet started.
    Without `readiness` it counts as ready while it serves; without `restart` its ranks are nobody's to restart,
    without `tracer` no call is traced; without `door` it has one of its own.
    """
    limits, security = limits or ServerLimits(), security or Security()
    door = door_of(limits, security) if door is None else door
    certificates = None if security.tls is None else ServerCertificates(security.tls)
    server = make_server(
        interceptors=[Interceptor(door, limits, tracer, frontend.config, frontend.pool)],
        options=limits.options(),
        maximum_concurrent_rpcs=limits.max_concurrent_rpcs,
    )
    inference_pb2_grpc.add_InferenceServicer_to_server(Inference(frontend, limits), server)
    control = Control(frontend, limits, info or ServiceInfo(), readiness, restart)
    control_pb2_grpc.add_ControlServicer_to_server(control, server)
    training_pb2_grpc.add_TrainingServicer_to_server(Training(frontend), server)
    if _reflects(limits, address):
        names = (INFERENCE, CONTROL, TRAINING, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
    return Server(server, frontend, address, certificates, readiness)


def _reflects(limits: ServerLimits, address: str) -> bool:
    if limits.reflection is not None:
        return limits.reflection
    return is_loopback(address.rpartition(":")[0].strip("[]"))
