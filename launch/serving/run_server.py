"""What `serve` does once its configuration is read: Ray, a worker group, front-end, gRPC server, and an orderly end.

One asyncio loop in this process holds front-end and server; the engine runs on rank 0. A signal drains: nothing new is
admitted, open requests may end within `server.drain_seconds`, a second signal ends them at once. A lost rank is a
pause (launch.serving.healing), and only where that is one too many the end, with the cause. What runs the ranks of each
replica is launch.serving.replicas.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.access.access_config import Security, shown_address
from cluster.actors.group.worker import Ready
from cluster.actors.host.load_progress import NUMBER_BYTES, over_budget
from cluster.actors.host.ray_head import Head
from cluster.actors.host.ray_session import ray_session
from cluster.actors.programs.serve_spec import RankFacts
from cluster.frontend.frontend import Frontend
from cluster.frontend.output.output_text import codec_of
from cluster.frontend.readiness import Readiness
from cluster.frontend.requests.call import FrontendConfig
from cluster.rpc.server import build_server, check_security
from cluster.rpc.services.control_service import ServiceInfo
from cluster.supervision import kept_up
from cluster.training.checkpoint.state_folder import StateFolder
from launch.observe.metrics_server import MetricsServer, check_host
from launch.observe.prometheus_metrics import ServeMetrics
from launch.observe.trace_export import check_traces, open_traces
from launch.serving.rank_specs import trained_dtype
from launch.serving.ray_loss import Leaving, RayWatch, first_of
from launch.serving.replicas import Replicas
from launch.serving.rolling_restart import ReplicaHealers
from launch.serving.serve_config import ServeConfig
from launch.serving.signals import Signals, end_undisturbed
from launch.serving.state_file import State, saved_state
from parallel.errors import ConfigError, TpError, WorkerError
from tp_decoders.adapters.peft_files import read_adapter_config
from tp_decoders.hub.repository import shown_name
from tp_decoders.model.task_config import CAUSAL
from tp_decoders.registry import read_config
from tp_decoders.tasks.task_settings import check_task, task_of
from tp_decoders.text.tokenizer import check_vocabulary, load_tokenizer

log = logging.getLogger(__name__)
CLOSE_GRACE_S = 2.0
THREADS = 16


def serve(config: ServeConfig, model: Path, log_level: int, leaving: Leaving) -> int:
    """Serves until a signal, a Drain call or a fault; the exit status."""
    # what is wrong with the checkpoint's description is said before anything starts
    check_checkpoint(config.task, model, config.mpt_reference)
    if config.adapter is not None:
        read_adapter_config(config.adapter)
    check_port(config.server.host, config.server.port)
    check_security(config.server.security)
    check_traces(config.observe)
    if config.observe.metrics_port is not None:
        check_host(config.observe.metrics_host, config.server.security, config.server.insecure_listen_anywhere)
        check_port(config.observe.metrics_host, config.observe.metrics_port)
    if config.training.enabled:
        dtype = trained_dtype(model, config.parallel.dtype)
        config = replace(config, parallel=replace(config.parallel, dtype=dtype))
    config.ray.check_room(config.parallel.dp, config.parallel.tp, config.parallel.device, config.placement.strategy)
    if config.training.save_root is not None:
        StateFolder(Path(config.training.save_root).expanduser())
    cores = config.ray.cores(config.parallel.tp * config.parallel.dp)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the loop takes over
    head = Head()
    try:
        with saved_state(config, model) as state, ray_session(config.ray.address, cores, head=head):
            try:
                return asyncio.run(_serve(config, model, log_level, state, head))
            finally:
                end_undisturbed()
    finally:
        leaving.behind = bool(head.lost)


def check_checkpoint(task: str, model: Path, mpt_reference: str = "auto") -> None:
    """Refuses a checkpoint whose description is wrong, or a task that it cannot have."""
    described = read_config(model, mpt_reference=mpt_reference)
    check_task(task, described.model_type)
    made_for = task_of(described.hf)
    if task == CAUSAL and made_for != CAUSAL:
        raise ConfigError(f"{model} was made for {made_for} and holds that head; add --task {made_for}")


def check_port(host: str, port: int) -> None:
    """Refuses an address nobody can listen on, before a model is loaded for it."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        where = shown_address(host, port)
        raise ConfigError(f"cannot listen on {where}: {reason}; choose another port or host") from error


async def _serve(config: ServeConfig, model: Path, log_level: int, state: State, head: Head) -> int:
    loop = asyncio.get_running_loop()
    ray = RayWatch(head, loop)
    # a replica that starts or is watched holds a thread for as long as that takes
    loop.set_default_executor(ThreadPoolExecutor(THREADS + 4 * config.parallel.dp, "serve"))
    signals = Signals(loop)
    replicas = Replicas(config, model, log_level, state.standing)
    async with AsyncExitStack() as stack:
        stack.callback(ray.let_threads_go)
        stack.push_async_callback(replicas.close, ray.gone)
        ready = await _started(replicas, signals, ray)
        if ready is None:
            return 0
        frontend, upkeep, port, watched = await _open(config, model, replicas, ready, stack, state)
        signals.restart = partial(upkeep.restart, config.server.drain_seconds)
        print(ready_line(config, model, ready, port) + watched, flush=True)
        await _run(frontend, signals, upkeep, config.server.drain_seconds, ray)
    return 0


async def _started(replicas: Replicas, signals: Signals, ray: RayWatch) -> list[list[Ready]] | None:
    """None where a signal came first, however it reached Ray."""
    starting = asyncio.ensure_future(_unless(signals.stop, replicas.start()))
    try:
        await first_of(asyncio.shield(starting), ray.gone.wait())
        if not ray.gone.is_set():
            return await starting
        await ray.settled(signals.stop)
        starting.add_done_callback(lambda done: done.cancelled() or done.exception())
        if signals.stop.is_set():
            return None
        raise WorkerError(ray.words)
    except TpError:
        await ray.settled(signals.stop)
        if signals.stop.is_set() and ray.gone.is_set():
            return None
        raise


async def _open(
    config: ServeConfig,
    model: Path,
    replicas: Replicas,
    ready: Sequence[Sequence[Ready]],
    stack: AsyncExitStack,
    state: State,
) -> tuple[Frontend, ReplicaHealers, int, str]:
    """Front-end and server over the replicas' engines, its port, and where its metrics are; the stack closes them."""
    for rank in (rank for ranks in ready for rank in ranks):
        log.info("%s", start_line(rank))
        for line in slow_parts(rank):
            log.warning("%s", line)
    links = await asyncio.to_thread(replicas.connect, ready)
    tokenizer = await asyncio.to_thread(load_tokenizer, model)
    frontend = Frontend(links, codec=codec_of(tokenizer), config=_patience(config), ledger=state.ledger)
    stack.push_async_callback(frontend.close)
    check_vocabulary(tokenizer, frontend.limits.vocab_size, model)
    upkeep = ReplicaHealers(frontend, replicas.healers(frontend, ready))
    info = _service_info(config, model, ready[0][0].facts)
    observe = config.observe
    readiness = Readiness(frontend, observe.canary_every_s, observe.canary_timeout_s, upkeep.condemn)
    address = shown_address(config.server.host, config.server.port)
    tracer, security = None, config.server.security
    if traces := open_traces(config.observe):
        stack.push_async_callback(asyncio.to_thread, traces.close)
        tracer = traces.tracer
    server = build_server(frontend, address, config.limits, info, security, readiness, upkeep.restart, tracer)
    frontend.start()
    watched = await _observe(config, frontend, readiness, info, stack)
    await server.start()
    stack.push_async_callback(server.stop, CLOSE_GRACE_S)
    return frontend, upkeep, server.port, watched


async def _observe(
    config: ServeConfig, frontend: Frontend, readiness: Readiness, info: ServiceInfo, stack: AsyncExitStack
) -> str:
    """The first canary, those to come, and the metrics; what the ready line says of them."""
    await readiness.prove()
    canaries = asyncio.create_task(kept_up("canaries", readiness.run))
    stack.callback(canaries.cancel)
    observe, server = config.observe, config.server
    if observe.metrics_port is None:
        return ""
    labels = {name: str(value) for name, value in vars(info).items()}
    metrics = MetricsServer(
        ServeMetrics(frontend, readiness, asyncio.get_running_loop(), labels),
        observe.metrics_host, observe.metrics_port, server.security, server.insecure_listen_anywhere,
    )  # fmt: skip
    stack.push_async_callback(asyncio.to_thread, metrics.close)
    return f"  metrics {shown_address(observe.metrics_host, metrics.port)}"


async def _run(frontend: Frontend, signals: Signals, upkeep: ReplicaHealers, drain_s: float, ray: RayWatch) -> None:
    """Until there is a reason to stop, and what was open has ended; what cannot be healed is raised."""
    healing = asyncio.create_task(upkeep.run())
    try:
        await first_of(signals.stop.wait(), frontend.drained.wait(), asyncio.shield(healing), ray.gone.wait())
        stops = signals.stop.is_set() or frontend.drained.is_set()
        if stops and not healing.done():  # a rank that is lost now is a pause of the drain
            ended = (signals.again.wait(), frontend.drain(drain_s), asyncio.shield(healing), ray.gone.wait())
            await first_of(*ended)
        if ray.gone.is_set():
            await ray.settled(signals.stop)
            if not (stops or signals.stop.is_set()):
                raise WorkerError(ray.words)
            frontend.fail(ray.words)  # whoever signalled this process signalled Ray's as well
        elif healing.done():
            await healing
    except WorkerError as error:
        frontend.fail(str(error).removeprefix("the engine is gone: "))
        raise
    finally:
        healing.cancel()


def _patience(config: ServeConfig) -> FrontendConfig:
    """Open requests wait for a new engine as long as one may come, if nothing else was asked for."""
    waits = math.inf if config.placement.max_restarts > 0 else 0.0
    return replace(config.frontend, recovery_seconds=config.frontend.recovery_seconds or waits)


def ready_line(config: ServeConfig, model: Path, ready: Sequence[Sequence[Ready]], port: int) -> str:
    """The one line that says what is served where; of replicas the cache of the first."""
    facts: RankFacts = ready[0][0].facts
    tokens = facts.kv_blocks * facts.block_size
    size = sum(rank.facts.kv_bytes for rank in ready[0]) / 1e6
    dp = f"dp={len(ready)} " if len(ready) > 1 else ""
    return (
        f"ready: {shown_address(config.server.host, port)}  model {shown_name(model)} ({facts.family}, {facts.dtype})  "
        + (f"{config.task}  " if config.task != CAUSAL else "")
        + f"tp={config.parallel.tp} {dp}on {config.parallel.device} ({facts.transport}, attention {facts.attention})  "
        f"KV cache {tokens} tokens ({facts.kv_blocks} blocks of {facts.block_size}, {size:.1f} MB)"
        + ("  training on" if config.training.enabled else "")
        + _protection(config.server.security)
    )


def _protection(security: Security) -> str:
    given = {
        "TLS": security.tls,
        "client certificates": security.tls and security.tls.client_ca,
        "tokens": security.token_file,
    }
    words = ", ".join(word for word, value in given.items() if value)
    return f"  {words}" if words else ""


def slow_parts(rank: Ready) -> list[str]:
    """What of a rank's start took longer than it should."""
    facts: RankFacts = rank.facts
    return over_budget(rank.place, rank.seconds, facts.parameters * NUMBER_BYTES[facts.dtype])


def start_line(rank: Ready) -> str:
    """What one rank holds and where its start-up time went."""
    facts: RankFacts = rank.facts
    where = f"cores {','.join(map(str, facts.cores))}" if facts.cores else "no core of its own"
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in rank.seconds.items())
    return f"{rank.place}: {facts.parameters / 1e6:.2f} M parameters, {where}, {facts.threads} thread(s); {phases}"


def _service_info(config: ServeConfig, model: Path, facts: RankFacts) -> ServiceInfo:
    return ServiceInfo(
        model_id=shown_name(model),
        family=facts.family,
        dtype=facts.dtype,
        device=config.parallel.device,
        numerics=config.parallel.numerics,
        tensor_parallel_size=config.parallel.tp,
        data_parallel_size=config.parallel.dp,
    )


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, Any]) -> Any:
    """The work's result, or None if the event came first; the work is then left to what closes its subject."""
    task = asyncio.create_task(work)
    await first_of(event.wait(), asyncio.shield(task))
    if task.done():
        return task.result()
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return None
