"""What a serving group is made of: which checkpoint, over how many ranks, in which type, with which engine.

Values that pickle; imports neither Ray nor torch. The command line and presets fill it in, the group and its ranks
read it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import ModelLimits
from cluster.training.train_calls import RestorePoint
from parallel.errors import ConfigError
from parallel.options import Recompute, check_recompute

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
Numerics = Literal["invariant", "fast"]
Transport = Literal["auto", "shm", "gloo"]
MptReference = Literal["auto", "transformers", "llm-foundry"]
"""Whose meaning the options of an MPT have (tp_decoders.families.mpt_config)."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread and in what type it computes. dtype None: the checkpoint's own."""

    tp: int = 1  # ranks of one replica
    dp: int = 1  # replicas of tp ranks each
    device: Device = "cpu"  # of the ranks
    dtype: Dtype | None = None  # of the weights and of what is computed
    numerics: Numerics = "invariant"  # invariant: the same bits at every layout and batch
    transport: Transport = "auto"  # between ranks of one host: auto takes shared memory on CPUs
    threads: int | None = None  # per rank; None: the node's cores, shared out among its ranks
    collective_timeout_s: float = 10.0  # a rank that waits longer for the others gives them up

    def __post_init__(self) -> None:
        if self.tp < 1:
            raise ConfigError(f"parallel.tp is {self.tp}; it must be at least 1")
        if self.dp < 1:
            raise ConfigError(f"parallel.dp is {self.dp}; it must be at least 1")
        for name, kind in {"device": Device, "numerics": Numerics, "transport": Transport}.items():
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"parallel.{name} is {getattr(self, name)!r}; choose one of {list(get_args(kind))}")
        if self.dtype is not None and self.dtype not in get_args(Dtype):
            raise ConfigError(f"parallel.dtype is {self.dtype!r}; choose one of {list(get_args(Dtype))}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"parallel.threads is {self.threads}; give at least 1, or leave it out")
        if self.collective_timeout_s <= 0:
            raise ConfigError(f"parallel.collective_timeout_s is {self.collective_timeout_s}; give seconds above 0")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Whether clients may change the weights that serve (off unless asked for: the port has no other lock), and where
    they may save them. All nodes must see `save_root` under the same path.
    """

    enabled: bool = False  # whether clients may train
    save_root: str | None = None  # where they may save, by name
    micro_batch_tokens: int = 1024  # computed at once; a longer sequence is computed whole
    recompute: Recompute = "none"  # what a backward pass computes again
    save_timeout_s: float = 600.0  # of one save
    session_idle_s: float = 300.0  # after that long without a call, waiting gradients give way to another caller's

    def __post_init__(self) -> None:
        if self.save_root is not None and not self.enabled:
            raise ConfigError("training.save_root is set but training is off; add --train (training.enabled=true)")
        if self.micro_batch_tokens < 1:
            raise ConfigError(f"training.micro_batch_tokens is {self.micro_batch_tokens}; give at least 1")
        check_recompute(self.recompute)
        if not self.save_timeout_s > 0:
            raise ConfigError(f"training.save_timeout_s is {self.save_timeout_s}; give seconds above 0")
        if not self.session_idle_s >= 0:
            raise ConfigError(f"training.session_idle_s is {self.session_idle_s}; give seconds, 0 or more")


@dataclass(frozen=True)
class FlightSpec:
    """What the dumps of one group of ranks are known by, and the folder they go to (None: the usual one)."""

    group: str = "unnamed"
    folder: str | None = None


@dataclass(frozen=True, kw_only=True)
class ServeSpec:
    """A model served by one group. `authkey` is what a front-end must prove it knows; each group's own, made when it
    starts."""

    model: str
    authkey: bytes = field(default=b"", repr=False)
    task: str = "causal-lm"
    mpt_reference: MptReference = "auto"
    adapter: str | None = None  # a PEFT adapter's folder, merged into the weights as they are loaded
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    start_timeout_s: float = 600.0
    flight: FlightSpec = FlightSpec()
    weights_cache: str | None = None  # a folder of each node for a copy of the checkpoint's files
    restore: RestorePoint | None = None  # what the weights were when a group before this one was lost


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What a serving rank says of itself when it is ready."""

    family: str
    dtype: str
    quantization: str  # what weights are rounded to, if they are
    parameters: int  # in this rank's shard
    kv_blocks: int
    block_size: int
    kv_bytes: int
    training_bytes: int  # kept free for training, 0 where that is off
    attention: str
    transport: str
    cores: tuple[int, ...]
    threads: int
    kernels: str  # as parallel.native.compiled.library.in_use says
    limits: ModelLimits | None = None  # rank 0
    engine_address: tuple[str, int] | None = None  # rank 0
