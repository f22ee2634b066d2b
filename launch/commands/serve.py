"""`tp-decoders serve`: a worker group on Ray and a gRPC server in front of it, until told to stop.

Reads the command line and presets, then hands over to launch.serving.run_server. Every setting of a preset can be given
as a dotted override; the flags are short names of the commonest.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field, replace
from os.path import expanduser
from typing import Any

from cluster.access.access_config import Security, TlsConfig, check_exposure
from cluster.actors.group.placement import PlacementConfig, Strategy, check_replicas
from cluster.actors.programs.serve_spec import MptReference, ParallelConfig, TrainingConfig
from cluster.engine.engine_config import EngineConfig
from cluster.frontend.journal.request_journal import LedgerConfig
from cluster.frontend.requests.call import FrontendConfig
from cluster.rpc.services.connection_limits import ServerLimits
from launch.observe import log_setup
from launch.observe.observe_config import ObserveConfig
from launch.paths import full_path
from launch.presets import Layer, build, find, overrides, read
from launch.ray.private_ray import own_ray
from launch.serving.ray_loss import prompt_end
from parallel.errors import ConfigError
from parallel.options import check_backend

FLAGS = {
    "model": "model",
    "task": "task",
    "adapter": "adapter",
    "tp": "parallel.tp",
    "dp": "parallel.dp",
    "device": "parallel.device",
    "dtype": "parallel.dtype",
    "host": "server.host",
    "port": "server.port",
    "state_dir": "server.state_dir",
    "kv_blocks": "engine.kv_blocks",
    "metrics_port": "observe.metrics_port",
    "log_json": "placement.log_json",
    "ray_address": "ray.address",
    "oversubscribe": "ray.oversubscribe",
    "train": "training.enabled",
    "save_root": "training.save_root",
    "tls_cert": "server.tls.cert",
    "tls_key": "server.tls.key",
    "tls_client_ca": "server.tls.client_ca",
    "token_file": "server.token_file",
    "reflection": "limits.reflection",
    "insecure_listen_anywhere": "server.insecure_listen_anywhere",
}
"""Which setting a flag stands for."""
ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves the ranks on a machine that does anything else
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anyone unless asked for
    "RAY_DEDUP_LOGS": "0",  # what two ranks say alike is still said by two ranks
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # a signal while Ray starts ends it at once, not in half a minute
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # a lost peer is reported by name; torch's C++ stack adds nothing
    "MALLOC_ARENA_MAX": "1",  # these three: a step finds the memory of the last one again, where glibc would give it
    "MALLOC_MMAP_THRESHOLD_": "4294967296",  # back and have the system zero it anew: a tenth of a training step
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}
"""Of a Ray cluster started here, unless set already; a standing one has its own."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Which Ray cluster: None starts one on this machine, with its cores or `num_cpus`, that ends with the server."""

    address: str | None = None  # HOST:PORT of a standing cluster's head, or auto: the one of this user on this machine
    num_cpus: int | None = None  # of the local cluster
    oversubscribe: bool = False  # as many cores for Ray as there are ranks: on CPUs ranks then share the real ones

    def __post_init__(self) -> None:
        if self.oversubscribe and (self.address is not None or self.num_cpus is not None):
            given = "address" if self.address is not None else "num_cpus"
            raise ConfigError(f"ray.oversubscribe has no effect beside ray.{given}; leave one of them out")
        if self.num_cpus is not None and self.num_cpus < 1:
            raise ConfigError(f"ray.num_cpus is {self.num_cpus}; give at least 1, or leave it out for all cores")
        if self.num_cpus is not None and self.address is not None:
            raise ConfigError(
                f"ray.num_cpus={self.num_cpus} is for a cluster that is started here; {self.address} has its "
                "own cores: leave it out (ray.num_cpus=null)"
            )

    def check_room(self, replicas: int, tp: int, device: str, strategy: Strategy) -> None:
        """Refuses before anything starts what this machine cannot hold; a standing cluster is asked once joined."""
        if self.address is not None:
            return
        found = {"CPU": self.cores(replicas * tp) or os.cpu_count() or 1}
        if device == "cuda":
            from torch import cuda

            found["GPU"] = cuda.device_count()
        check_replicas([{"Alive": True, "Resources": found}], replicas, tp, device, strategy)

    def cores(self, ranks: int) -> int | None:
        """What a local cluster is told to have; None: what Ray finds."""
        return max(ranks, len(os.sched_getaffinity(0))) if self.oversubscribe else self.num_cpus


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the gRPC server listens, who may call it, and how long a stopping one waits for open requests."""

    host: str = "127.0.0.1"  # address to listen on
    port: int = 50051  # 0: any free one
    drain_seconds: float = 30.0  # of a stopping server, for what is open
    state_dir: str | None = None  # what must outlive this process: the ledger, where its ranks are
    tls: TlsConfig | None = None
    token_file: str | None = None  # who may call and for what
    insecure_listen_anywhere: bool = False  # without TLS or without knowing who calls, too

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"server.port is {self.port}; give 1 to 65535, or 0 for any free one")
        if not self.drain_seconds >= 0:
            raise ConfigError(f"server.drain_seconds is {self.drain_seconds:g}; give seconds, 0 or more")

    @property
    def security(self) -> Security:
        """With paths that need no shell."""
        tls = self.tls and TlsConfig(**{name: path and expanduser(path) for name, path in vars(self.tls).items()})
        return Security(tls=tls, token_file=self.token_file and expanduser(self.token_file))


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Everything about one server; a preset holds any part of it."""

    model: str  # a folder, or ORG/NAME[@revision] of the Hugging Face hub
    adapter: str | None = None  # a PEFT LoRA adapter, merged as the weights load
    task: str = "causal-lm"  # or another head's: see tasks.md
    mpt_reference: MptReference = "auto"  # whose rules an MPT file follows; auto: by its origin
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    limits: ServerLimits = field(default_factory=ServerLimits)
    server: ServerConfig = field(default_factory=ServerConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)

    def __post_init__(self) -> None:
        if self.training.enabled and self.parallel.dp > 1:
            raise ConfigError(
                f"training.enabled with parallel.dp={self.parallel.dp}: a training call changes one replica's weights, "
                "and the others would answer with other ones; train with parallel.dp=1, or serve without --train"
            )
        check_backend("engine.attention_backend", self.engine.attention_backend, self.parallel.device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="the folder of a Hugging Face checkpoint, or ORG/NAME[@revision] of the hub"
    )
    parser.add_argument(
        "--adapter", metavar="ADAPTER",
        help="a PEFT LoRA adapter (a folder or ORG/NAME[@revision]), merged into the weights as they load",
    )  # fmt: skip
    parser.add_argument(
        "--task",
        help="causal-lm (default), sequence-classification, token-classification, question-answering or double-heads",
    )
    parser.add_argument("--tp", type=int, help="tensor-parallel ranks (default 1)")
    parser.add_argument("--dp", type=int, help="replicas of --tp ranks each, behind the one port (default 1)")
    parser.add_argument("--device", help="cpu (default) or cuda")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's own)")
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, help="port to listen on (default 50051; 0: any free one)")
    parser.add_argument(
        "--state-dir",
        metavar="FOLDER",
        help="survive this process's own death: what was asked and answered is kept there",
    )
    _add_security(parser)
    parser.add_argument("--kv-blocks", type=int, help="size of the key/value cache (default: from free memory)")
    parser.add_argument("--metrics-port", type=int, help="give Prometheus metrics there, to this machine (default: no)")
    parser.add_argument(
        "--ray-address", help="a standing Ray cluster, as in auto or HOST:6379 (default: start one here)"
    )
    parser.add_argument(
        "--oversubscribe", action="store_const", const=True,
        help="on CPUs: allow more ranks than there are cores (for trials: they share them, and are slow)",
    )  # fmt: skip
    parser.add_argument(
        "--train", action="store_const", const=True, help="let clients train the weights that serve (default: no)"
    )
    parser.add_argument("--save-root", metavar="FOLDER", help="where clients may save training states, by name")
    parser.add_argument("--preset", metavar="NAME", action="append", default=[], help="from configs/engine, or a path")
    parser.add_argument("--cluster", metavar="NAME", help="from configs/cluster, or a path")
    parser.add_argument(
        "overrides", nargs="*", metavar="name.name=value", help="any setting, as in engine.max_sequences=8"
    )
    log_setup.add_arguments(parser)


def _add_security(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tls-cert", metavar="FILE", help="the server's certificate chain (PEM): encrypt connections")
    parser.add_argument("--tls-key", metavar="FILE", help="its key; both are read again when they change")
    parser.add_argument("--tls-client-ca", metavar="FILE", help="let in only clients with a certificate of this CA")
    parser.add_argument("--token-file", metavar="FILE", help="who may call and for what; see tp-decoders token --help")
    parser.add_argument(
        "--reflection", action=argparse.BooleanOptionalAction, help="gRPC reflection (default: on loopback only)"
    )
    parser.add_argument(
        "--insecure-listen-anywhere", action="store_const", const=True,
        help="listen where others can reach it even without TLS or without knowing who calls",
    )  # fmt: skip


def configuration(args: argparse.Namespace) -> ServeConfig:
    """Presets, then flags, then overrides; later ones win."""
    layers = [read(find(name, "engine")) for name in args.preset]
    if args.cluster is not None:
        layers.append(read(find(args.cluster, "cluster")))
    config = build(ServeConfig, [*layers, _flags(args), overrides(args.overrides)])
    assert isinstance(config, ServeConfig), "build makes what it was asked for"
    check_exposure(config.server.host, config.server.security, config.server.insecure_listen_anywhere)
    return config


def run(args: argparse.Namespace) -> int:
    level = log_setup.configure(args.verbose, args.log_json)
    config = configuration(args)
    for name, value in ENVIRONMENT.items():  # before Ray is imported, which reads some of them then
        os.environ.setdefault(name, value)
    with prompt_end() as leaving, own_ray(config.ray.address):
        from launch.serving.run_server import serve  # brings in Ray, gRPC and torch
        from tp_decoders.hub.repository import locate
        from tp_decoders.hub.snapshot_cache import ADAPTER

        model = full_path(locate(config.model))
        if config.adapter is not None:
            config = replace(config, adapter=str(locate(config.adapter, ADAPTER)))
        return serve(config, model, level, leaving)


def _flags(args: argparse.Namespace) -> Layer:
    values: dict[str, Any] = {}
    for flag, setting in FLAGS.items():
        value = getattr(args, flag)
        if value is not None:
            *sections, name = setting.split(".")
            place = values
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
    return Layer("command line", values)
