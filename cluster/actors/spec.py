"""What a serving group is made of: which checkpoint, over how many ranks, in which type, with which engine.

Values that pickle; imports no Ray. The group and its ranks read it, the command line and presets fill it in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from cluster.engine.config import EngineConfig
from parallel.errors import ConfigError
from parallel.group import Numerics

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
Transport = Literal["auto", "shm", "gloo"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread and in what type it computes. dtype None: the checkpoint's own."""

    tp: int = 1
    dp: int = 1
    device: Device = "cpu"
    dtype: Dtype | None = None
    numerics: Numerics = "invariant"
    transport: Transport = "auto"
    threads: int | None = None  # per rank; None: one pinned core per rank, all cores where there is one rank
    collective_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("tp", "dp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name} is {getattr(self, name)}; it must be at least 1")
        choices = {"device": Device, "numerics": Numerics, "transport": Transport}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"parallel.{name} is {getattr(self, name)!r}; choose one of {list(get_args(kind))}")
        if self.dtype is not None and self.dtype not in get_args(Dtype):
            raise ConfigError(f"parallel.dtype is {self.dtype!r}; choose one of {list(get_args(Dtype))}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"parallel.threads is {self.threads}; give at least 1, or leave it out")


@dataclass(frozen=True, kw_only=True)
class ServeSpec:
    """A model served by one group."""

    model: str
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
