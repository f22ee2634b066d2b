"""Everything about one server, as a preset and the command line say it; launch.serving.resolve_serve checks it."""

from __future__ import annotations

from dataclasses import dataclass, field
from os.path import expanduser

from cluster.access.access_config import Security, TlsConfig
from cluster.actors.group.placement import PlacementConfig
from cluster.actors.programs.serve_spec import MptReference, ParallelConfig, TrainingConfig
from cluster.engine.engine_config import EngineConfig
from cluster.frontend.ledger.request_ledger import LedgerConfig
from cluster.frontend.requests.call import FrontendConfig
from cluster.rpc.services.connection_limits import ServerLimits
from launch.observe.observe_config import ObserveConfig
from launch.ray.ray_config import RayConfig
from parallel.errors import ConfigError
from parallel.options import check_backend

GRPC_PORT, HTTP_PORT = 50051, 8000


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where gRPC and HTTP listen, who may call, and how long a stopping server waits for open requests."""

    host: str = "127.0.0.1"  # address to listen on
    port: int = GRPC_PORT  # gRPC's; 0: any free one
    http_port: int | str = "auto"  # 0: any free one; none: no HTTP; auto: 8000 where port is 50051, else none
    chat_template: str | None = None  # a Jinja file, in place of the checkpoint's own
    drain_seconds: float = 30.0  # of a stopping server, for what is open
    state_dir: str | None = None  # what must outlive this process: the ledger, where its ranks are
    tls: TlsConfig | None = None
    token_file: str | None = None  # who may call and for what
    insecure_listen_anywhere: bool = False  # without TLS or without knowing who calls, too

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"server.port is {self.port}; give 1 to 65535, or 0 for any free one")
        if not (self.http_port in ("auto", "none") or (type(self.http_port) is int and 0 <= self.http_port < 65536)):
            given = f"server.http_port is {self.http_port!r}"
            raise ConfigError(f"{given}; give 1 to 65535, 0 for any free one, none for no HTTP, or auto")
        if not self.drain_seconds >= 0:
            raise ConfigError(f"server.drain_seconds is {self.drain_seconds:g}; give seconds, 0 or more")

    @property
    def http(self) -> int | None:
        """The HTTP port; by itself only beside gRPC's usual one, so that several servers of a machine do not meet."""
        if isinstance(self.http_port, int):
            return self.http_port
        return HTTP_PORT if self.http_port == "auto" and self.port == GRPC_PORT else None

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
