"""What every attention backend is given, and what it is: a layer's facts, how the flat row of tokens falls into
sequences, where their keys lie.

    AttentionMetadata.packed    whole sequences one after another (training)
    BlockTables.step            one serving step over a paged cache

It is made once per pass and used by all layers. Its tensors lie where the model does; what a backend wants of them is
made when it first asks. T tokens, N query heads, K kv heads, H head; S sequences, B blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from parallel.attention.heads import KVHeads
from parallel.attention.kv_cache import KVCache, KVLayout
from parallel.errors import ConfigError
from parallel.layers.dropout import HeadMasks
from parallel.native.attention import RUN, PagedStep


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

    def spread(self, k_TKH: Tensor, v_TKH: Tensor) -> tuple[AttentionSpec, Tensor, Tensor]:
        """The same for keys and values by query head, for those who know no groups."""
        if self.kv is None:
            return self, k_TKH, v_TKH
        return replace(self, kv=None), *self.kv.spread_both(k_TKH, v_TKH)


QKV = tuple[Tensor, Tensor, Tensor]
"""q [T, N, H], k and v [T, K, H]."""


class Backend(ABC):
    """One implementation of attention over local heads. Its cache is laid out as it wants to read it."""

    name: ClassVar[str]
    drops: ClassVar[bool]  # whether it takes masks
    cache_type: ClassVar[type[KVCache]]

    @abstractmethod
    def attend(
        self, spec: AttentionSpec, qkv: QKV, metadata: AttentionMetadata, cache: KVCache | None, masks: HeadMasks | None
    ) -> Tensor:
        """[T, N, H]. With a cache the new keys and values are written to it and attended over with what it holds, which
        is not differentiable; without, the metadata is of whole sequences.
        """

    @classmethod
    def obstacle(cls, device: torch.device, dtype: torch.dtype, alibi: bool, head_dim: int) -> str | None:
        """Why it cannot run, and what to do about it; None where it can."""
        return None

    def cache(self, layout: KVLayout, num_blocks: int) -> KVCache:
        """An empty one."""
        return self.cache_type(layout, num_blocks)


def starts_of(lengths: Sequence[int]) -> list[int]:
    """0, then the running sums: sequence s is starts[s]..starts[s + 1] of the flat row."""
    return list(accumulate(lengths, initial=0))


def numbers(values: array[int], device: torch.device) -> Tensor:
    """On the device, in one copy."""
    dtype = torch.int32 if values.typecode == "i" else torch.int64
    made = torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
    return made if device.type == "cpu" else made.to(device)


class Starts(NamedTuple):
    """Where sequences begin, and how long their contexts are: int32, on the device."""

    query_starts_S1: Tensor
    context_starts_S1: Tensor
    context_lens_S: Tensor


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """Sequence s brings query_lens[s] new tokens, the last of its context_lens[s]. `tables_SB` has each one's blocks,
    int32 on the device, anything beyond those that its context needs; None: whole sequences, nothing of them is cached.
    """

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    device: torch.device
    tables_SB: Tensor | None = None
    block_size: int = RUN
    max_block: int = -1

    @staticmethod
    def packed(lengths: Sequence[int], device: torch.device | str = "cpu") -> AttentionMetadata:
        """Whole sequences one after another in the flat row."""
        if any(length < 1 for length in lengths):
            raise ConfigError(
                f"packed sequences of {list(lengths)} tokens: each needs at least one; leave empty ones out"
            )
        return AttentionMetadata(tuple(lengths), tuple(lengths), torch.device(device))

    @staticmethod
    def build(
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionMetadata:
        """One step of sequences whose tables are not kept."""
        tables = BlockTables(block_size, device)
        for slot, blocks in enumerate(block_tables):
            tables.write(slot, 0, blocks)
        return tables.step(range(len(block_tables)), query_lens, context_lens)

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Of each sequence, where its new tokens begin and end in the flat row."""
        return list(pairwise(starts_of(self.query_lens)))

    @cached_property
    def positions_T(self) -> Tensor:
        """[T] int64: the place of every new token in its sequence."""
        places = array("q")
        for query, context in zip(self.query_lens, self.context_lens, strict=True):
            if query == 1:
                places.append(context - 1)
            else:
                places.extend(range(context - query, context))
        return numbers(places, self.device)

    @cached_property
    def starts(self) -> Starts:
        values = array("i", accumulate(self.query_lens, initial=0))
        values.extend(accumulate(self.context_lens, initial=0))
        values.extend(self.context_lens)
        border = len(self.query_lens) + 1
        return Starts(*numbers(values, self.device).split((border, border, border - 1)))

    @cached_property
    def paged_step(self) -> PagedStep:
        """For the native kernel; of a model on the CPU."""
        tables_SB = self.scratch_tables if self.tables_SB is None else self.tables_SB
        return PagedStep(self.starts.query_starts_S1, self.starts.context_lens_S, tables_SB, self.block_size)

    @cached_property
    def scratch_tables(self) -> Tensor:
        """Of whole sequences: the blocks of a cache that holds one sequence after another."""
        starts = starts_of([-(-length // self.block_size) for length in self.context_lens])
        width = max((stop - start for start, stop in pairwise(starts)), default=0)
        return numbers(array("i", starts[:-1]), self.device)[:, None] + torch.arange(width, dtype=torch.int32)

    @cached_property
    def new_slots_T(self) -> Tensor:
        """The cache slots (block * block_size + offset) of the new tokens."""
        return self._slots(self.starts.query_starts_S1.diff(), self.num_tokens, self.positions_T)

    @cached_property
    def context_slots_C(self) -> Tensor:
        """Those of all tokens, sequence after sequence, ascending in each."""
        counts_S, total = self.starts.context_lens_S, sum(self.context_lens)
        firsts_C = self.starts.context_starts_S1[:-1].repeat_interleave(counts_S, output_size=total)
        return self._slots(counts_S, total, torch.arange(total, device=self.device) - firsts_C)

    def _slots(self, counts_S: Tensor, total: int, positions: Tensor) -> Tensor:
        assert self.tables_SB is not None, "of a step over a cache"
        rows = torch.arange(len(counts_S), device=self.device).repeat_interleave(counts_S, output_size=total)
        return self.tables_SB[rows, positions // self.block_size] * self.block_size + positions % self.block_size


class BlockTables:
    """The cache blocks of the sequences in slots, kept where the model lives: a step writes what has changed and takes
    its sequences' rows.
    """

    def __init__(self, block_size: int, device: torch.device | str = "cpu") -> None:
        self.block_size, self.device = block_size, torch.device(device)
        self._tables = torch.zeros((0, 0), dtype=torch.int32, device=self.device)
        self._sizes: list[int] = []
        self._changed: dict[int, int] = {}  # place in the tensor: block
        self._max_block = -1  # ever written
        self._rows: tuple[tuple[int, ...], Tensor] | None = None  # of the last step, until something is written

    def write(self, slot: int, first: int, blocks: Sequence[int]) -> None:
        """A slot's blocks from number `first` on; what it had there and beyond is forgotten."""
        stop = first + len(blocks)
        if blocks and min(blocks) < 0:
            raise ConfigError(f"a block table holds {min(blocks)}; blocks are numbered from 0")
        slots, width = self._tables.shape
        if slot >= slots or stop > width:
            self._grow(max(slot + 1, slots), max(stop, width))
        self._sizes[slot] = stop
        if blocks:
            self._max_block = max(self._max_block, *blocks)
            place = slot * self._tables.shape[1] + first
            self._changed.update(zip(range(place, place + len(blocks)), blocks, strict=True))

    def step(self, slots: Sequence[int], query_lens: Sequence[int], context_lens: Sequence[int]) -> AttentionMetadata:
        """context_lens include the new tokens; a table may be longer than its sequence needs, never shorter."""
        if not len(query_lens) == len(context_lens) == len(slots):
            raise ConfigError(
                f"a step of {len(query_lens)} query lengths, {len(context_lens)} context lengths and "
                f"{len(slots)} block tables: one of each per sequence"
            )
        size, sizes = self.block_size, self._sizes
        for slot, query, context in zip(slots, query_lens, context_lens, strict=True):
            blocks = sizes[slot] if slot < len(sizes) else 0
            if not 0 < query <= context <= blocks * size:
                raise ConfigError(
                    f"a sequence of {context} tokens, {query} of them new, in {blocks} blocks of {size}: it needs at "
                    "least one new token, no more than it has, and blocks for all of them"
                )
        tables_SB = self._rows_of(tuple(slots))
        return AttentionMetadata(tuple(query_lens), tuple(context_lens), self.device, tables_SB, size, self._max_block)

    def _rows_of(self, slots: tuple[int, ...]) -> Tensor:
        self._flush()
        if self._rows is None or self._rows[0] != slots:
            self._rows = slots, self._tables.index_select(0, numbers(array("i", slots), self.device))
        return self._rows[1]

    def _flush(self) -> None:
        if self._changed:
            places, blocks = array("q", self._changed), array("i", self._changed.values())
            self._tables.view(-1).scatter_(0, numbers(places, self.device), numbers(blocks, self.device))
            self._changed, self._rows = {}, None

    def _grow(self, slots: int, blocks: int) -> None:
        """By half as much again at least, so that it is rare."""
        self._flush()
        have = self._tables.shape
        shape = [max(w, h + h // 2) if w > h else h for w, h in zip((slots, blocks), have, strict=True)]
        wider = torch.zeros(shape, dtype=torch.int32, device=self.device)
        wider[: have[0], : have[1]] = self._tables
        self._tables = wider
        self._sizes.extend([0] * (shape[0] - len(self._sizes)))
