"""`tp-decoders status`: a server as a person would want to see it: health, requests, memory, speed, training, ranks.

Asks over gRPC like any client and measures nothing itself; `--watch` asks again and adds rates. The exit status is 0
where the server is ready and 1 where it is not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.safe_text import for_terminal
from launch.client import client_flags
from launch.client.generate import check_address
from parallel.errors import ConfigError, TpError

SERVICES = ("Inference", "Training", "Control")
TIMEOUT_S = 5.0
CLEAR = "\x1b[H\x1b[2J"
Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Status:
    """One look at a server. A part that it did not give is empty, with the reason in `refused`."""

    address: str
    at: float
    server: Values
    health: Mapping[str, str]
    model: Values = field(default_factory=dict)
    load: Values = field(default_factory=dict)
    training: Values = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        return bool(self.server["ready"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default="127.0.0.1:50051", help="the server (default 127.0.0.1:50051)")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=1.0, metavar="SECONDS", help="look again and again (default every 1 s)"
    )
    parser.add_argument("--json", action="store_true", help="JSON, one line per look")
    client_flags.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    check_address(args.address)
    if args.watch is not None and not args.watch > 0:
        raise ConfigError(f"--watch {args.watch:g}: give seconds above 0, or nothing for one second")
    if args.watch is None:
        status = asyncio.run(look(args))
        show(status, None, args.json)
        return 0 if status.ready else 1
    try:
        watch(args)
    except KeyboardInterrupt:
        return 0
    return 0


def watch(args: argparse.Namespace) -> None:
    """Until interrupted; a server that does not answer is shown as such."""
    before = None
    while True:
        try:
            status = asyncio.run(look(args))
        except TpError as error:
            _print(f"{args.address}: {error}", not args.json)
        else:
            show(status, before, args.json, clear=True)
            before = status
        time.sleep(args.watch)


async def look(args: argparse.Namespace) -> Status:
    """Everything the server says of itself now."""
    from cluster.rpc.client.client import AsyncClient, ServiceError

    async with AsyncClient(args.address, client_flags.access_of(args)) as client:
        await client.ready(TIMEOUT_S)
        server = plain(await client.server_info(TIMEOUT_S))
        health = {"server": await client.health("", TIMEOUT_S)}
        for name in SERVICES:
            health[name] = await client.health(f"tp_decoders.v1.{name}", TIMEOUT_S)
        parts: dict[str, Any] = {}
        refused: dict[str, str] = {}
        calls = {"model": client.model_info, "load": client.load, "training": client.train_state}
        for name, call in calls.items():
            try:
                parts[name] = plain(await call(timeout=TIMEOUT_S))
            except ServiceError as error:
                refused[name] = str(error)
    return Status(address=args.address, at=time.monotonic(), server=server, health=health, refused=refused, **parts)


def plain(message: Any) -> dict[str, Any]:
    """A protocol message as plain values, every field by its name."""
    values: dict[str, Any] = {}
    for field_ in message.DESCRIPTOR.fields:
        value = getattr(message, field_.name)
        if field_.message_type is not None:
            value = [plain(one) for one in value] if field_.is_repeated else plain(value)
        elif field_.is_repeated:
            value = list(value)
        elif field_.enum_type is not None:
            value = field_.enum_type.values_by_number[value].name
        values[field_.name] = value
    return values


def show(status: Status, before: Status | None, as_json: bool, clear: bool = False) -> None:
    if as_json:
        values = {name: value for name, value in vars(status).items() if name != "at"}
        _print(json.dumps(values), False)
    else:
        _print("\n".join(lines(status, before)), clear)


def _print(text: str, clear: bool) -> None:
    print((CLEAR if clear and sys.stdout.isatty() else "") + for_terminal(text), flush=True)


def lines(status: Status, before: Status | None = None) -> Iterator[str]:
    """What a person reads."""
    server, model = status.server, status.model
    state = server["state"].removeprefix("SERVING_STATE_")
    ready = "ready" if status.ready else f"NOT READY: {server['not_ready'] or 'no reason given'}"
    yield f"{status.address}  {state}, {ready}  up {duration(server['uptime_seconds'])}, {server['restarts']} restarts"
    if server["fault"]:
        yield f"fault     {server['fault']}"
    yield "health    " + "  ".join(f"{name} {word}" for name, word in status.health.items())
    if model:
        parallel = server["parallelism"]
        yield (
            f"model     {model['model_id']} ({model['family']}, {model['dtype']}{_weights(model)})  "
            f"tp={parallel['tensor_parallel_size']} dp={parallel['data_parallel_size']} on {model['device']}, "
            f"{model['numerics']} numerics  context {model['max_context']}  vocabulary {model['vocab_size']}"
            + (f"  kernels {server['kernels']}" if server["kernels"] else "")
        )
    yield from _load_lines(status, before)
    yield from _training_lines(status)
    yield from _replica_lines(status)


def _weights(model: Mapping[str, Any]) -> str:
    kind = model.get("quantization")
    return f", {kind} weights" if kind else ""


def _replica_lines(status: Status) -> Iterator[str]:
    """Each replica and its ranks; of a single one its ranks alone."""
    replicas = status.server["replicas"]
    if len(replicas) < 2:
        yield from _rank_lines(status.load.get("ranks", ()))
        return
    loads = {each["replica"]: each["load"] for each in status.load.get("replicas", ())}
    for replica in replicas:
        state = "ready" if replica["ready"] else "NOT READY" if replica["has_engine"] else "OUT"
        why = f": {replica['reason']}" if replica["reason"] else ", about to be restarted" if replica["held"] else ""
        yield (
            f"replica {replica['replica']}  {state}{why}  {replica['open_requests']} open, "
            f"{replica['outstanding_tokens']} tokens outstanding  {replica['restarts']} restarts  routed "
            f"{replica['routed_by_prefix']} by prefix, {replica['routed_by_load']} by load"
        )
        yield from _rank_lines(loads.get(replica["replica"], {}).get("ranks", ()))


def _rank_lines(ranks: Iterable[Values]) -> Iterator[str]:
    for rank in ranks:
        device = f"  GPU {size(rank['device_memory_bytes'])}" if rank["device_memory_bytes"] else ""
        yield (
            f"rank {rank['rank']:<4} {rank['node']}  process {rank['pid']}  memory {size(rank['memory_bytes'])}{device}"
            f"  {rank['collectives']} collectives"
        )


def _load_lines(status: Status, before: Status | None) -> Iterator[str]:
    load = status.load
    if not load:
        yield f"engine    no answer: {status.refused.get('load', '')}"
        return
    yield (
        f"requests  {load['running']} running  {load['waiting']} waiting  {load['open_requests']} open  "
        f"{load['finished_requests']} finished  {load['aborted_requests']} aborted"
    )
    yield f"tokens    {load['generated_tokens']} generated  {load['prompt_tokens']} prompt{_rates(status, before)}"
    if load["draft_tokens"]:
        yield (
            f"drafts    {load['draft_tokens']} tokens in {load['drafts']}, {load['accepted_draft_tokens']} came true "
            f"({share(load['accepted_draft_tokens'], load['draft_tokens'])}): as many steps saved"
        )
    held = load["kv_blocks_total"] - load["kv_blocks_free"]
    hits = share(load["prefix_tokens_reused"], load["prefix_tokens_looked_up"])
    yield (
        f"KV cache  {bar(held, load['kv_blocks_total'])} {held} of {load['kv_blocks_total']} blocks held, "
        f"{load['kv_blocks_cached']} keep prefixes (hits {hits})  {load['preemptions']} preemptions"
    )
    if load["steps"]:
        parts = ("forward", "sample", "schedule", "commit")
        shares = ", ".join(f"{part} {share(load[f'{part}_seconds'], load['step_seconds'])}" for part in parts)
        yield f"step      {load['step_seconds'] / load['steps'] * 1e3:.2f} ms over {load['steps']} steps: {shares}"
    if load["canary_fault"]:
        yield f"canary    {load['canary_fault']}"


def _rates(status: Status, before: Status | None) -> str:
    if before is None or not before.load or status.at <= before.at:
        return ""
    seconds = status.at - before.at
    names = ("generated_tokens", "prompt_tokens")
    rates = [max(0, status.load[name] - before.load[name]) / seconds for name in names]
    return f"  now {rates[0]:.1f} and {rates[1]:.1f} tokens/s"


def _training_lines(status: Status) -> Iterator[str]:
    training = status.training
    if not training:
        reason = status.refused.get("training", "")
        off = reason.startswith(("FAILED_PRECONDITION", "UNIMPLEMENTED"))
        yield "training  off" if off else f"training  no answer: {reason}"
        return
    saving = f"  writing {training['saving']}" if training["saving"] else ""
    saved = ", ".join(state["name"] for state in training["saved"][-5:])
    yield (
        f"training  step {training['step']}  weight version {training['weight_version']}  "
        f"{training['waiting_calls']} gradients wait{saving}" + (f"  saved: {saved}" if saved else "")
    )


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02}:{rest:02}"


def size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none yet"


def bar(part: float, whole: float, width: int = 20) -> str:
    filled = round(width * part / whole) if whole else 0
    return "[" + "#" * filled + "." * (width - filled) + "]"
