"""The paged key/value cache: sizes, layouts, copies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.attention.kv_cache import KVLayout, TokenCache
from parallel.attention.selector import backend_named
from parallel.errors import ConfigError

LAYOUT = KVLayout(n_layers=3, n_kv_heads=2, head_dim=25, block_size=32, dtype=torch.bfloat16, device="cpu")


@pytest.mark.parametrize("backend", ["eager", "cpu", "sdpa"])
def test_a_cache_takes_exactly_the_bytes_its_layout_states(backend: str) -> None:
    cache = backend_named(backend).cache(LAYOUT, 5)
    assert sum(x.numel() * x.element_size() for x in (*cache.keys, *cache.values)) == 5 * LAYOUT.bytes_per_block
    assert all(not x.any() for x in (*cache.keys, *cache.values))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_blocks_are_copied_in_every_layer_and_all_read_before_any_is_written(backend: str) -> None:
    cache = backend_named(backend).cache(LAYOUT, 4)
    for i, x in enumerate((*cache.keys, *cache.values)):
        for block in range(4):
            x[block] = 10 * i + block
    cache.copy_blocks([(0, 1), (1, 2)])
    for i, x in enumerate((*cache.keys, *cache.values)):
        assert [x[block].unique().tolist() for block in range(4)] == [[10 * i], [10 * i], [10 * i + 1], [10 * i + 3]]
    cache.copy_blocks([])


@pytest.mark.parametrize("pairs", [[(0, 4)], [(-1, 0)], [(0, 1), (2, 1)]])
def test_impossible_copies_are_refused(pairs: list[tuple[int, int]]) -> None:
    with pytest.raises(ConfigError, match="copy_blocks"):
        TokenCache(LAYOUT, 4).copy_blocks(pairs)


@pytest.mark.parametrize(
    "change", [{"block_size": 8}, {"block_size": 0}, {"block_size": 24}, {"n_layers": 0}, {"head_dim": 0}]
)
def test_impossible_layouts_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        replace(LAYOUT, **change)  # type: ignore[arg-type]


def test_a_cache_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        TokenCache(LAYOUT, 0)
