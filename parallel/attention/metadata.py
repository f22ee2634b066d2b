"""What every attention backend is given: a layer's facts, and how the flat row of tokens falls into sequences.

`Packed` is a row of whole sequences (training); `AttentionMeta` is one serving step over a paged cache. Both are built
once and used by all layers; what a backend wants in tensors is made on first use and kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from parallel.attention.heads import KVHeads
from parallel.attention.kv_cache import KVCache
from parallel.errors import ConfigError
from parallel.layers.dropout import HeadMasks
from parallel.native.attention import RUN, PagedStep

# T tokens, N query heads, K kv heads, H head; S sequences


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """One layer's attention: score = scale * q.k - slope * (q_pos - k_pos); slopes are float32, one per local head.

    `dropout` of its probabilities in passes that drop, by the local heads' global numbers `head_ids`. `kv` says which
    key/value head each query head reads where that is not its own; without it they read them in groups of N / K.
    """

    layer: int
    scale: float
    slopes: Tensor | None = None
    dropout: float = 0.0
    head_ids: Sequence[int] = ()
    kv: KVHeads | None = None

    def by_head(self, kv_TKH: Tensor, n_heads: int) -> Tensor:
        """[T, N, H]: the key/value head that each query head reads."""
        if self.kv is not None:
            return self.kv.spread(kv_TKH)
        n_kv = kv_TKH.shape[1]
        if n_kv in (1, n_heads):
            return kv_TKH.expand(-1, n_heads, -1)
        return kv_TKH.repeat_interleave(n_heads // n_kv, 1)


class Backend(Protocol):
    """One implementation of attention over local heads."""

    name: str
    drops: bool  # whether `causal` takes masks

    def causal(
        self,
        spec: AttentionSpec,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        packed: Packed,
        masks: HeadMasks | None = None,
    ) -> Tensor: ...

    def cached(
        self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cache: KVCache, meta: AttentionMeta
    ) -> Tensor: ...


def starts_of(lengths: Sequence[int]) -> list[int]:
    """0, then the running sums: sequence s is starts[s]..starts[s + 1] of the flat row."""
    return list(accumulate(lengths, initial=0))


def int32(values: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    numbers = torch.frombuffer(array("i", values), dtype=torch.int32) if values else torch.empty(0, dtype=torch.int32)
    return numbers if torch.device(device).type == "cpu" else numbers.to(device)


class Packed:
    """Whole sequences one after another in the flat row."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        if any(length < 1 for length in self.lengths):
            raise ConfigError(
                f"packed sequences of {list(self.lengths)} tokens: each needs at least one; leave empty ones out"
            )
        self.starts = starts_of(self.lengths)
        self.num_tokens = self.starts[-1]
        self._starts_on: dict[torch.device, Tensor] = {}

    @cached_property
    def starts_S1(self) -> Tensor:
        return int32(self.starts)

    def starts_on(self, device: torch.device) -> Tensor:
        if device not in self._starts_on:
            self._starts_on[device] = self.starts_S1.to(device)
        return self._starts_on[device]

    @cached_property
    def scratch_step(self) -> tuple[PagedStep, int]:
        """The same row as a step over a scratch cache with one sequence's blocks after another; and how many blocks."""
        block_starts = starts_of([-(-length // RUN) for length in self.lengths])
        width = max((stop - start for start, stop in pairwise(block_starts)), default=0)
        tables = int32(block_starts[:-1])[:, None] + torch.arange(width, dtype=torch.int32)
        return PagedStep(self.starts_S1, int32(self.lengths), tables, RUN), block_starts[-1]


def _table_tensor(block_tables: Sequence[Sequence[int]], needed: Sequence[int]) -> tuple[Tensor, int]:
    """Tables cut to what is needed and filled up with 0 to [S, B], and the highest block (-1 without any)."""
    width = max(needed, default=0)
    flat = array("i")
    for table, blocks in zip(block_tables, needed, strict=True):
        flat.extend(table[:blocks])
        flat.frombytes(bytes(flat.itemsize * (width - blocks)))
    if not flat:
        return torch.zeros((0, 0), dtype=torch.int32), -1
    if min(flat) < 0:
        raise ConfigError(f"a block table holds {min(flat)}; blocks are numbered from 0")
    return torch.frombuffer(flat, dtype=torch.int32).view(-1, width), max(flat)


class DeviceStep(NamedTuple):
    """A step's numbers as int32 tensors on its device."""

    query_starts: Tensor
    context_starts: Tensor
    context_lens: Tensor
    tables: Tensor


@dataclass(frozen=True, eq=False)
class AttentionMeta:
    """One step over a paged cache: sequence s brings query_lens[s] new tokens, the last of its context_lens[s]."""

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    query_starts: tuple[int, ...]
    block_size: int
    max_block: int
    tables_SB: Tensor  # int32 on the CPU; entries beyond a sequence's blocks are 0
    device: torch.device

    @staticmethod
    def build(
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionMeta:
        """context_lens include the new tokens; a table may be longer than its sequence needs, never shorter."""
        if not len(query_lens) == len(context_lens) == len(block_tables):
            raise ConfigError(
                f"a step of {len(query_lens)} query lengths, {len(context_lens)} context lengths and "
                f"{len(block_tables)} block tables: one of each per sequence"
            )
        needed = [-(-context // block_size) for context in context_lens]
        for query, context, table, blocks in zip(query_lens, context_lens, block_tables, needed, strict=True):
            if not 1 <= query <= context or len(table) < blocks:
                raise ConfigError(
                    f"a sequence of {context} tokens, {query} of them new, in {len(table)} blocks of {block_size}: it "
                    "needs at least one new token, no more than it has, and blocks for all of them"
                )
        tables_SB, max_block = _table_tensor(block_tables, needed)
        starts = tuple(starts_of(query_lens))
        return AttentionMeta(
            tuple(query_lens), tuple(context_lens), starts, block_size, max_block, tables_SB, torch.device(device)
        )

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    @cached_property
    def paged_step(self) -> PagedStep:
        return PagedStep(int32(self.query_starts), int32(self.context_lens), self.tables_SB, self.block_size)

    @cached_property
    def context_slots(self) -> list[Tensor]:
        """For each sequence the cache slots (block * block_size + offset) of its positions, ascending."""
        offsets = torch.arange(self.block_size)
        tables = self.tables_SB.long()
        return [
            (table[:, None] * self.block_size + offsets).flatten()[:context].to(self.device)
            for table, context in zip(tables, self.context_lens, strict=True)
        ]

    @cached_property
    def all_context_slots(self) -> Tensor:
        return torch.cat(self.context_slots)

    @cached_property
    def on_device(self) -> DeviceStep:
        starts = int32(self.query_starts, self.device), int32(starts_of(self.context_lens), self.device)
        return DeviceStep(*starts, int32(self.context_lens, self.device), self.tables_SB.to(self.device))

    @cached_property
    def new_slots_T(self) -> Tensor:
        """The cache slots of the new tokens."""
        new = [slots[len(slots) - query :] for slots, query in zip(self.context_slots, self.query_lens, strict=True)]
        return torch.cat(new) if new else torch.empty(0, dtype=torch.long, device=self.device)
