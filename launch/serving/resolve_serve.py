"""The door of `serve`: a configuration is checked once, in one order, and becomes one frozen value that has for each
part of a server what that part needs.

All is checked here that needs only the configuration, the checkpoint's description and this machine. Imports no Ray;
torch comes with the checkpoint's description, gRPC with certificates.
"""

from __future__ import annotations

import logging
import math
import socket
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.access.access_config import Security, check_exposure, shown_address
from cluster.access.token_file import TokenFile
from cluster.actors.group.placement import PlacementConfig
from cluster.actors.programs.serve_program import ServeProgram
from cluster.actors.programs.serve_spec import Dtype, FlightSpec, TrainingConfig
from cluster.frontend.ledger.request_ledger import LedgerConfig
from cluster.frontend.requests.call import FrontendConfig
from cluster.http.requests.chat_template import check_template
from cluster.rpc.services.connection_limits import ServerLimits
from cluster.training.checkpoint.state_folder import StateFolder
from launch.observe.metrics_server import check_host
from launch.observe.observe_config import ObserveConfig
from launch.observe.trace_export import check_traces
from launch.paths import full_path
from launch.serving.serve_config import ServeConfig
from parallel.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A port: where it listens, and what is asked of those who come."""

    host: str
    port: int
    security: Security


@dataclass(frozen=True, kw_only=True)
class StateConfig:
    """What of a server outlives its process, and where. `ranks`: they go on, too."""

    folder: Path
    ledger: LedgerConfig
    ranks: bool


@dataclass(frozen=True, kw_only=True)
class ResolvedServe:
    """One server, by its parts. Paths are full, types and numbers those that are used."""

    program: ServeProgram  # of one replica's ranks; its key is made when it starts
    replicas: int
    placement: PlacementConfig
    ray_address: str | None  # of a standing cluster
    cores: int | None  # of a cluster that is started here; None: what Ray finds
    state: StateConfig | None
    frontend: FrontendConfig
    limits: ServerLimits
    endpoint: Endpoint  # gRPC's
    http: Endpoint | None
    chat_template: Path | None
    drain_seconds: float
    metrics: Endpoint | None
    observe: ObserveConfig


def resolve_serve(config: ServeConfig, log_level: int) -> ResolvedServe:
    """Checks all that can be checked before anything starts; finds the model, or fetches it."""
    server, parallel, observe = config.server, config.parallel, config.observe
    security, insecure = server.security, server.insecure_listen_anywhere
    check_exposure(server.host, security, insecure)
    model, adapter = _checkpoint(config)
    endpoint = Endpoint(host=server.host, port=server.port, security=security)
    check_port(endpoint)
    http = None if server.http is None else replace(endpoint, port=server.http)
    if http is not None:
        check_port(http, "; with server.http_port=none there is no HTTP")
    template = None if server.chat_template is None else full_path(server.chat_template)
    if template is not None:
        check_template(template)
    _check_security(security)
    check_traces(observe)
    metrics = None
    if observe.metrics_port is not None:
        metrics = replace(endpoint, host=observe.metrics_host, port=observe.metrics_port)
        check_host(metrics.host, security, insecure)
        check_port(metrics)
    dtype = quantised_dtype(config) or (
        trained_dtype(model, parallel.dtype) if config.training.enabled else parallel.dtype
    )
    cores = config.ray.room(parallel.dp, parallel.tp, parallel.device, config.placement.strategy)
    return ResolvedServe(
        program=_program(config, model, adapter, dtype),
        replicas=parallel.dp,
        placement=replace(config.placement, log_level=log_level),
        ray_address=config.ray.address,
        cores=cores,
        state=_state(config),
        frontend=_frontend(config.frontend, config.placement),
        limits=config.limits,
        endpoint=endpoint,
        http=http,
        chat_template=template,
        drain_seconds=server.drain_seconds,
        metrics=metrics,
        observe=observe,
    )


def _program(config: ServeConfig, model: Path, adapter: str | None, dtype: Dtype | None) -> ServeProgram:
    flight = config.observe.flight_dir
    return ServeProgram(
        model=str(model),
        task=config.task,
        mpt_reference=config.mpt_reference,
        adapter=adapter,
        parallel=replace(config.parallel, dp=1, dtype=dtype),  # a replica knows of no other
        engine=config.engine,
        training=_training(config.training),
        start_timeout_s=config.placement.start_timeout_s,
        weights_cache=config.placement.weights_cache,
        flight=FlightSpec(folder=None if flight is None else str(full_path(flight))),
    )


def _checkpoint(config: ServeConfig) -> tuple[Path, str | None]:
    """The folders of model and adapter; refuses what is wrong with a description, or a task that it cannot have."""
    from tp_decoders.adapters.peft_files import read_adapter_config  # brings in torch
    from tp_decoders.hub.repository import locate
    from tp_decoders.hub.snapshot_cache import ADAPTER
    from tp_decoders.model.task_config import CAUSAL
    from tp_decoders.registry import read_config
    from tp_decoders.tasks.task_settings import check_task, task_of

    model = full_path(locate(config.model))
    adapter = None if config.adapter is None else locate(config.adapter, ADAPTER)
    described = read_config(model, mpt_reference=config.mpt_reference)
    check_task(config.task, described.model_type)
    made_for = task_of(described.hf)
    if config.task == CAUSAL and made_for != CAUSAL:
        raise ConfigError(f"{model} was made for {made_for} and holds that head; add --task {made_for}")
    if adapter is not None:
        read_adapter_config(adapter)
    return model, None if adapter is None else str(full_path(adapter))


def check_port(endpoint: Endpoint, more: str = "") -> None:
    """Refuses an address nobody can listen on, before a model is loaded for it."""
    host, port = endpoint.host, endpoint.port
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        where = shown_address(host, port)
        raise ConfigError(f"cannot listen on {where}: {reason}; choose another port or host{more}") from error


def _check_security(security: Security) -> None:
    """Reads the files once, so that what is wrong with them is said before a model is loaded."""
    if security.token_file is not None:
        TokenFile(security.token_file)
    if security.tls is not None:
        from cluster.rpc.tls import ServerCertificates

        ServerCertificates(security.tls)


def quantised_dtype(config: ServeConfig) -> Dtype | None:
    """The type that quantised weights are multiplied in, or None; refuses what they do not go with."""
    scheme, parallel = config.engine.quantize, config.parallel
    if scheme is None:
        return None
    given = f"engine.quantize is {scheme!r}"
    if parallel.device != "cpu":
        raise ConfigError(f"{given} and parallel.device {parallel.device!r}; quantised weights are served on CPUs only")
    if parallel.dtype not in (None, "bfloat16"):
        raise ConfigError(f"{given} and parallel.dtype {parallel.dtype!r}; quantised weights take bfloat16")
    if config.training.enabled:
        raise ConfigError(f"{given} and training is on; quantised weights are not trained, so leave one of them out")
    if config.adapter is not None:
        raise ConfigError(
            f"{given} and an adapter is given, whose sum with quantised weights would be rounded again; merge it first "
            "(tp-decoders convert --adapter) and quantise what comes out"
        )
    return "bfloat16"


def trained_dtype(model: Path, given: Dtype | None) -> Dtype | None:
    """The type to train a checkpoint in: never float16, whose gradients underflow; a line says where that is new."""
    import torch

    from tp_decoders.checkpoint.load_save import checkpoint_dtype

    if given == "float16":
        raise ConfigError("parallel.dtype is 'float16', whose gradients underflow; train in 'bfloat16' or 'float32'")
    if given is not None or checkpoint_dtype(model) != torch.float16:
        return given
    log.warning(
        "%s is stored in float16, in which gradients underflow: it is trained in float32, which holds the same values; "
        "parallel.dtype=bfloat16 takes half the memory", model,
    )  # fmt: skip
    return "float32"


def _training(config: TrainingConfig) -> TrainingConfig:
    """With the root there, as a path that means the same on every rank: their working folders differ."""
    root = config.save_root
    return config if root is None else replace(config, save_root=str(StateFolder(Path(root).expanduser()).root))


def _state(config: ServeConfig) -> StateConfig | None:
    """Ranks outlive their server where the Ray cluster does, unless they train: what they have learned is known to that
    process alone."""
    if config.server.state_dir is None:
        return None
    ranks = config.ray.address is not None and not config.training.enabled
    return StateConfig(folder=full_path(config.server.state_dir), ledger=config.ledger, ranks=ranks)


def _frontend(config: FrontendConfig, placement: PlacementConfig) -> FrontendConfig:
    """Open requests wait for a new engine as long as one may come, if nothing else was asked for."""
    waits = math.inf if placement.max_restarts > 0 else 0.0
    return replace(config, recovery_seconds=config.recovery_seconds or waits)
