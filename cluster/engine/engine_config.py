"""How an engine is sized: batch and queue limits, the key/value cache's blocks, what computes attention.

Values only; which numbers a deployment uses is decided by presets and the command line above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from parallel.errors import ConfigError
from parallel.options import Scheme, check_backend, check_scheme


@dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    """Guesses of the next tokens, checked as further rows of a step: fewer steps, the same answers to the bit."""

    method: Literal["off", "ngram"] = "off"  # ngram: what followed the last tokens before
    num_speculative_tokens: int = 7  # of one sequence in one step, at most; fewer while they come out wrong
    prompt_lookup_min: int = 3  # last tokens that must have occurred before
    max_rows: int = 8  # of a step, guesses included; none beside as many others
    recent_tokens: int = 8192  # of the same caller's last answers that are looked through too; 0: its own text alone

    def __post_init__(self) -> None:
        least = {"num_speculative_tokens": 1, "prompt_lookup_min": 1, "max_rows": 2, "recent_tokens": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ConfigError(f"speculation.{name} is {value!r}; it must be a whole number of at least {low}")
        if self.method not in ("off", "ngram"):
            raise ConfigError(f"speculation.method is {self.method!r}; choose off or ngram")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """An engine's sizes. Without kv_blocks: what `kv_memory_fraction` of free memory holds, never more than useful."""

    block_size: int = 16  # tokens of one block of the cache
    kv_memory_fraction: float = 0.6  # of free memory
    kv_blocks: int | None = None  # of the cache
    max_step_tokens: int = 1024  # computed in one step
    max_scored_tokens: int = 256  # prompt positions of one step whose full rows of logits are wanted
    max_sequences: int = 64  # running at once
    max_queue: int = 4096  # waiting; more are refused
    priority_patience: float = 30.0  # seconds of waiting that outweigh one level of priority: nobody waits for ever
    share_stretch: float = 2.0  # while callers share, a step may take so many times as long as their shortest
    prefix_caching: bool = True  # beginnings that were computed before are not again
    replay: bool = True  # of decode steps that were recorded, on CPUs
    quantize: Scheme | None = None  # weights rounded to int8 or int4 as they are read; on CPUs, in bfloat16
    attention_backend: str | None = None  # eager, cpu, sdpa or flash; the best one that works unless given
    speculation: SpeculationConfig = SpeculationConfig()

    @property
    def guest_slots(self) -> int:
        """Beside max_sequences: one for every 16, for callers that run nothing while others have all. A step still
        holds one token of every running sequence."""
        return min(self.max_sequences // 16, self.max_step_tokens - self.max_sequences)

    def __post_init__(self) -> None:
        for name in ("block_size", "max_step_tokens", "max_scored_tokens", "max_sequences", "max_queue"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"engine.{name} is {value!r}; it must be a whole number of at least 1")
        if not 0.0 < self.kv_memory_fraction <= 1.0:
            raise ConfigError(
                f"engine.kv_memory_fraction is {self.kv_memory_fraction!r}; it must be above 0 and at most 1"
            )
        check_scheme("engine.quantize", self.quantize)
        check_backend("engine.attention_backend", self.attention_backend)
        if self.kv_blocks is not None and self.kv_blocks < 1:
            raise ConfigError(
                f"engine.kv_blocks is {self.kv_blocks}; give at least 1, or leave it out to use free memory"
            )
        if self.max_step_tokens < self.max_sequences:
            raise ConfigError(
                f"engine.max_step_tokens is {self.max_step_tokens}, less than engine.max_sequences "
                f"{self.max_sequences}: a step must hold one token of every running sequence; raise the first or lower "
                "the second"
            )
        if not (self.priority_patience > 0 and math.isfinite(self.priority_patience)):
            raise ConfigError(f"engine.priority_patience is {self.priority_patience!r}; give seconds above 0")
        if not self.share_stretch > 1.0:
            raise ConfigError(f"engine.share_stretch is {self.share_stretch!r}; give a number above 1")


def num_kv_blocks(config: EngineConfig, bytes_per_block: int, free_bytes: int, max_context: int) -> int:
    """How many blocks one rank can hold; `free_bytes` is this rank's part of what its host or device has left."""
    if config.kv_blocks is not None:
        return config.kv_blocks
    useful = config.max_sequences * -(-max_context // config.block_size)
    affordable = int(free_bytes * config.kv_memory_fraction) // max(1, bytes_per_block)
    if affordable < 1:
        raise ConfigError(
            f"no room for the key/value cache: one block needs {bytes_per_block} bytes, engine.kv_memory_fraction "
            f"{config.kv_memory_fraction:g} of {free_bytes} free bytes is "
            f"{int(free_bytes * config.kv_memory_fraction)}; use a smaller model or type, more ranks, or set "
            "engine.kv_blocks"
        )
    return min(useful, affordable)
