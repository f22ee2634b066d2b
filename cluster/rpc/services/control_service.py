"""The methods of Control: decode, one call of the front-end (or of who runs its ranks), encode. No rule lives here."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from cluster.access.caller_limits import CALLER, WHO
from cluster.access.token_file import Role
from cluster.engine.request import EngineLoad
from cluster.frontend.fleet.engine_stats import total
from cluster.frontend.fleet.fleet import Replica, Restarted
from cluster.frontend.fleet.routing import Sent
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.readiness import Readiness
from cluster.request_errors import InvalidRequest, RestartRefused, Violation
from cluster.rpc.services.connection_limits import ServerLimits
from parallel.errors import TpError
from tp_decoders.model.task_config import CAUSAL
from tp_decoders.protocol import control_pb2 as control
from tp_decoders.protocol.control_pb2_grpc import ControlServicer

if TYPE_CHECKING:
    import grpc

Restart = Callable[[float], Awaitable[Restarted]]
"""Restarts one replica after the other; is given the seconds that open requests have to end."""

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
    kernels: str = ""
    quantization: str = ""
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1


class Control(ControlServicer):
    """What runs, how busy it is, and how to stop things."""

    def __init__(
        self,
        frontend: Frontend,
        limits: ServerLimits,
        info: ServiceInfo,
        readiness: Readiness | None = None,
        restart: Restart | None = None,
    ) -> None:
        self._frontend = frontend
        self._readiness = readiness
        self._restart = restart
        self._limits = limits
        self._info = info
        self._started = time.monotonic()

    async def GetServerInfo(
        self, request: control.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> control.ServerInfo:
        info, config = self._info, self._frontend.config
        serving = self._frontend.state is State.SERVING
        return control.ServerInfo(
            server_version=software_version(),
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
            kernels=info.kernels,
            replicas=map(_replica, self._frontend.fleet.replicas, self._frontend.fleet.router.sent),
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
            quantization=info.quantization,
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
        loads = await self._frontend.loads()
        message = load_message(total(loads.values()), self._frontend.num_open)
        if len(self._frontend.fleet.replicas) > 1:
            message.replicas.extend(_replica_load(seat.replica, len(seat.open), load) for seat, load in loads.items())
        return message

    async def Abort(self, request: control.AbortRequest, context: grpc.aio.ServicerContext) -> control.AbortResponse:
        account = CALLER.get()
        whose = None if account is None or Role.CONTROL in account.grant.roles else WHO.get()
        return control.AbortResponse(aborted=self._frontend.abort(request.request_ids, whose))

    async def Drain(self, request: control.DrainRequest, context: grpc.aio.ServicerContext) -> control.DrainResponse:
        return control.DrainResponse(aborted=await self._frontend.drain(_grace(request)))

    async def Restart(
        self, request: control.RestartRequest, context: grpc.aio.ServicerContext
    ) -> control.RestartResponse:
        grace = _grace(request)
        if self._restart is None:
            raise RestartRefused("this server does not run its engines' processes; restart them where they are run")
        done = await self._restart(grace)
        return control.RestartResponse(replicas=done.replicas, handed_over=done.handed_over)


def _grace(request: control.DrainRequest | control.RestartRequest) -> float:
    grace = request.grace_seconds if request.HasField("grace_seconds") else DEFAULT_GRACE_SECONDS
    if not 0 <= grace <= MAX_GRACE_SECONDS:
        rule = f"{grace!r} is not allowed; give seconds from 0 to {MAX_GRACE_SECONDS:g}"
        raise InvalidRequest.of([Violation("grace_seconds", rule)])
    return grace


def _replica(replica: Replica, sent: Sent) -> control.ReplicaInfo:
    seat = replica.seat
    reason = replica.doubt if seat else replica.fault
    return control.ReplicaInfo(
        replica=replica.index,
        has_engine=seat is not None,
        ready=not reason,
        reason=reason,
        held=replica.held,
        restarts=replica.restarts,
        open_requests=len(seat.open) if seat else 0,
        outstanding_tokens=seat.tokens if seat else 0,
        routed_by_prefix=sent.by_prefix,
        routed_by_load=sent.by_load,
    )


def _replica_load(replica: int, open_requests: int, load: EngineLoad | TpError) -> control.ReplicaLoad:
    if isinstance(load, EngineLoad):
        return control.ReplicaLoad(replica=replica, load=load_message(load, open_requests))
    return control.ReplicaLoad(replica=replica, refused=str(load))


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


def software_version() -> str:
    try:
        return metadata.version("tp-decoders")
    except metadata.PackageNotFoundError:
        return "unpackaged"
