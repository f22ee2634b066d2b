"""The paged key/value cache of one rank: a pool of fixed-size blocks per layer, laid out as its backend reads them.

It holds device tensors and knows nothing of sequences: which block belongs to whom is decided elsewhere and arrives as
block tables. A block takes the same bytes in every layout. No collectives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.errors import ConfigError
from parallel.native.attention import RUN

UNLIMITED_BLOCKS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """What one rank stores per token: n_kv_heads are its own (0 where it owns no heads), `by_layer` where layers differ
    (pruned heads).
    """

    n_layers: int
    n_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device | str
    by_layer: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.block_size % RUN:
            raise ConfigError(
                f"a KV block of {self.block_size} tokens: block_size must be a positive multiple of {RUN}; use 16 or 32"
            )
        if self.n_layers < 1 or self.n_kv_heads < 0 or self.head_dim < 1:
            raise ConfigError(
                f"a KV cache of {self.n_layers} layers, {self.n_kv_heads} heads of {self.head_dim}: layers and "
                "head_dim must be at least 1, heads at least 0"
            )

    def heads(self, layer: int) -> int:
        """This rank's key/value heads of a layer."""
        return self.n_kv_heads if self.by_layer is None else self.by_layer[layer]

    @property
    def bytes_per_block(self) -> int:
        """Of all layers, keys and values."""
        heads = sum(map(self.heads, range(self.n_layers)))
        return 2 * heads * self.head_dim * self.block_size * self.dtype.itemsize


class KVCache(ABC):
    """keys[layer] and values[layer], zero at first: [num_blocks, *block_shape(heads)]. A backend makes its own kind."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        if not 1 <= num_blocks <= UNLIMITED_BLOCKS:
            raise ConfigError(f"a KV cache of {num_blocks} blocks; it needs at least one: give it more memory")
        self.layout, self.num_blocks = layout, num_blocks
        shapes = [self.block_shape(heads) for heads in map(layout.heads, range(layout.n_layers))]
        self.keys, self.values = (
            [torch.zeros((num_blocks, *shape), dtype=layout.dtype, device=layout.device) for shape in shapes]
            for _ in range(2)
        )

    @abstractmethod
    def block_shape(self, heads: int) -> tuple[int, ...]:
        """Of a block of a layer with so many heads."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (from, to) in every layer; all are read before any is written."""
        if not pairs:
            return
        sources, targets = zip(*pairs, strict=True)
        if len(set(targets)) != len(targets) or not all(0 <= b < self.num_blocks for b in (*sources, *targets)):
            raise ConfigError(
                f"copy_blocks({list(pairs)}): targets must differ and all blocks lie in 0..{self.num_blocks - 1}"
            )
        from_blocks, to_blocks = (torch.tensor(blocks, device=self.layout.device) for blocks in (sources, targets))
        for blocks in (*self.keys, *self.values):
            blocks[to_blocks] = blocks[from_blocks]


class TokenCache(KVCache):
    """Blocks of tokens, [block_size, K, H]."""

    def block_shape(self, heads: int) -> tuple[int, ...]:
        return self.layout.block_size, heads, self.layout.head_dim

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [T, K, H] at the given slots (block * block_size + offset)."""
        return self._flat(self.keys[layer])[slots], self._flat(self.values[layer])[slots]

    def scatter(self, layer: int, slots: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Write keys and values to slots."""
        self._flat(self.keys[layer])[slots] = k_TKH
        self._flat(self.values[layer])[slots] = v_TKH

    def _flat(self, blocks: Tensor) -> Tensor:
        return blocks.view(self.num_blocks * self.layout.block_size, *blocks.shape[2:])
