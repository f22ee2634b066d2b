"""What `serve` does once its configuration is resolved: Ray, worker groups, front-end, gRPC server, an orderly end.

One asyncio loop in this process holds front-end and server; the engine runs on rank 0. A signal drains: nothing new is
admitted, open requests may end within `server.drain_seconds`, a second signal ends them at once. A lost rank is a
pause (launch.serving.healing), and only where that is one too many the end, with the cause. What runs the ranks of each
replica is launch.serving.replicas. Each part is given its own part of launch.serving.resolve_serve's value.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from cluster.access.access_config import Security, shown_address
from cluster.actors.group.worker import Phases, Ready
from cluster.actors.host.load_progress import NUMBER_BYTES, over_budget
from cluster.actors.host.ray_head import RayHead
from cluster.actors.host.ray_session import ray_session
from cluster.actors.programs.serve_program import ServeProgram
from cluster.actors.programs.serve_spec import RankFacts
from cluster.frontend.frontend import Frontend
from cluster.frontend.ledger.request_ledger import Ledger
from cluster.frontend.output.output_text import codec_of
from cluster.frontend.readiness import Readiness
from cluster.frontend.requests.call import FrontendConfig
from cluster.rpc.server import build_server
from cluster.rpc.services.control_service import ServiceInfo
from cluster.rpc.services.door import door_of
from cluster.supervision import kept_up
from launch.observe.metrics_server import MetricsServer
from launch.observe.prometheus_metrics import ServeMetrics
from launch.observe.trace_export import open_traces
from launch.serving.http_side import open_http
from launch.serving.ray_loss import Leaving, RayWatch, first_of
from launch.serving.replicas import Replicas
from launch.serving.resolve_serve import Endpoint, ResolvedServe
from launch.serving.rolling_restart import ReplicaHealers
from launch.serving.signals import Signals, end_undisturbed
from launch.serving.start_phases import listening_line, process_age
from launch.serving.state_file import State, saved_state
from parallel.errors import TpError, WorkerError
from tp_decoders.hub.repository import shown_name
from tp_decoders.model.task_config import CAUSAL
from tp_decoders.text.tokenizer import check_vocabulary, load_tokenizer

log = logging.getLogger(__name__)
CLOSE_GRACE_S = 2.0
THREADS = 16


def serve(server: ResolvedServe, leaving: Leaving) -> int:
    """Serves until a signal, a Drain call or a fault; the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the loop takes over
    head, phases = RayHead(), Phases()
    saved = saved_state(server.state, server.program, server.replicas, server.placement)
    try:
        with saved as state, ExitStack() as stack:
            with phases("Ray"):
                stack.enter_context(ray_session(server.ray_address, server.cores, head=head))
            try:
                return asyncio.run(_serve(server, state, head, phases))
            finally:
                end_undisturbed()
    finally:
        leaving.behind = bool(head.lost)


async def _serve(server: ResolvedServe, state: State, head: RayHead, phases: Phases) -> int:
    loop = asyncio.get_running_loop()
    ray = RayWatch(head, loop)
    # a replica that starts or is watched holds a thread for as long as that takes
    loop.set_default_executor(ThreadPoolExecutor(THREADS + 4 * server.replicas, "serve"))
    signals = Signals(loop)
    replicas = Replicas(server.program, server.replicas, server.placement, state.file)
    async with AsyncExitStack() as stack:
        stack.callback(ray.let_threads_go)
        stack.push_async_callback(replicas.close, ray.gone)
        with phases("ranks"):
            ready = await _started(replicas, signals, ray)
        if ready is None:
            return 0
        _report(ready)
        with phases("front-end"):
            frontend = await _open(server.program.model, server.frontend, state.ledger, replicas, ready, stack)
        upkeep = ReplicaHealers(frontend, replicas.healers(frontend, ready))
        with phases("canary and gRPC"):
            line = await _listen(server, frontend, upkeep, ready, stack)
        log.info("%s", listening_line(process_age(), time.process_time(), phases.seconds))
        signals.restart = partial(upkeep.restart, server.drain_seconds)
        print(line, flush=True)
        await _run(frontend, signals, upkeep, server.drain_seconds, ray)
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


def _report(ready: Sequence[Sequence[Ready]]) -> None:
    for rank in (rank for ranks in ready for rank in ranks):
        log.info("%s", start_line(rank))
        for line in slow_parts(rank):
            log.warning("%s", line)


async def _open(
    model: str,
    config: FrontendConfig,
    ledger: Ledger | None,
    replicas: Replicas,
    ready: Sequence[Sequence[Ready]],
    stack: AsyncExitStack,
) -> Frontend:
    """The front-end over the replicas' engines; the stack closes it."""
    links = await asyncio.to_thread(replicas.connect, ready)
    tokenizer = await asyncio.to_thread(load_tokenizer, model)
    frontend = Frontend(links, codec=codec_of(tokenizer), config=config, ledger=ledger)
    stack.push_async_callback(frontend.close)
    check_vocabulary(tokenizer, frontend.limits.vocab_size, model)
    return frontend


async def _listen(
    server: ResolvedServe,
    frontend: Frontend,
    upkeep: ReplicaHealers,
    ready: Sequence[Sequence[Ready]],
    stack: AsyncExitStack,
) -> str:
    """gRPC and HTTP, started once a canary came back, and the metrics; the ready line. The stack closes them."""
    observe, security = server.observe, server.endpoint.security
    info = _service_info(server.program, server.replicas, ready[0][0].facts)
    readiness = Readiness(frontend, observe.canary_every_s, observe.canary_timeout_s, upkeep.condemn)
    tracer = None
    if traces := open_traces(observe):
        stack.push_async_callback(asyncio.to_thread, traces.close)
        tracer = traces.tracer
    address = shown_address(server.endpoint.host, server.endpoint.port)
    door = door_of(server.limits, security)
    grpc = build_server(frontend, address, server.limits, info, security, readiness, upkeep.restart, tracer, door)
    frontend.start()
    await readiness.prove()
    canaries = asyncio.create_task(kept_up("canaries", readiness.run))
    stack.callback(canaries.cancel)
    numbers = ServeMetrics(frontend, readiness, asyncio.get_running_loop(), _labels(info))
    watched = "" if server.metrics is None else _give_metrics(server.metrics, numbers, stack)
    await grpc.start()
    stack.push_async_callback(grpc.stop, CLOSE_GRACE_S)
    if server.http is not None:
        http = await open_http(server, server.http, frontend, info, readiness, numbers, door, tracer)
        stack.push_async_callback(http.stop, CLOSE_GRACE_S)
        watched = f"  http {shown_address(server.http.host, http.port)}{watched}"
    address = shown_address(server.endpoint.host, grpc.port)
    return ready_line(server.program, ready, address) + _protection(security) + watched


def _labels(info: ServiceInfo) -> dict[str, str]:
    return {name: str(value) for name, value in vars(info).items()}


def _give_metrics(endpoint: Endpoint, numbers: ServeMetrics, stack: AsyncExitStack) -> str:
    """What the ready line says of them."""
    metrics = MetricsServer(numbers, endpoint.host, endpoint.port, endpoint.security)
    stack.push_async_callback(asyncio.to_thread, metrics.close)
    return f"  metrics {shown_address(endpoint.host, metrics.port)}"


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


def ready_line(program: ServeProgram, ready: Sequence[Sequence[Ready]], address: str) -> str:
    """The one line that says what is served where; of replicas the cache of the first."""
    facts: RankFacts = ready[0][0].facts
    parallel, tokens = program.parallel, facts.kv_blocks * facts.block_size
    size = sum(rank.facts.kv_bytes for rank in ready[0]) / 1e6
    dp = f"dp={len(ready)} " if len(ready) > 1 else ""
    kind = facts.dtype + (f", {facts.quantization} weights" if facts.quantization else "")
    return (
        f"ready: {address}  model {shown_name(Path(program.model))} ({facts.family}, {kind})  "
        + (f"{program.task}  " if program.task != CAUSAL else "")
        + f"tp={parallel.tp} {dp}on {parallel.device} ({facts.transport}, attention {facts.attention})  "
        f"KV cache {tokens} tokens ({facts.kv_blocks} blocks of {facts.block_size}, {size:.1f} MB)"
        + ("  training on" if program.training.enabled else "")
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
    threads = f"{facts.threads} thread(s)" + (f", kernels {facts.kernels}" if facts.kernels else "")
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in rank.seconds.items())
    return f"{rank.place}: {facts.parameters / 1e6:.2f} M parameters, {where}, {threads}; {phases}"


def _service_info(program: ServeProgram, replicas: int, facts: RankFacts) -> ServiceInfo:
    return ServiceInfo(
        model_id=shown_name(Path(program.model)),
        family=facts.family,
        dtype=facts.dtype,
        quantization=facts.quantization,
        device=program.parallel.device,
        numerics=program.parallel.numerics,
        kernels=facts.kernels,
        tensor_parallel_size=program.parallel.tp,
        data_parallel_size=replicas,
    )


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, Any]) -> Any:
    """The work's result, or None if the event came first; the work is then left to what closes its subject."""
    task = asyncio.create_task(work)
    await first_of(event.wait(), asyncio.shield(task))
    if task.done():
        return task.result()
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return None
