"""Sharding rules: what each rank takes, and that joining gives the full tensor back."""

import pytest
import torch

from parallel.attention.heads import HeadLayout, alibi_slopes
from parallel.errors import CollectiveError, ConfigError
from parallel.ranks.group import Group
from parallel.sharding.rules import Fused, Part, Replicated, Split

SIZES = [1, 2, 3, 4, 5, 8, 16]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [3, 25, 64, 4096, 50257])
def test_join_of_take_is_the_full_tensor(size: int, rows: int) -> None:
    shards = Group(0, size).shards(rows)
    full = torch.randn(rows, 2)
    rule = Split(0, shards)
    assert torch.equal(rule.join([rule.take(full, rank) for rank in range(size)]), full)
    assert sum(shards.sizes) == rows


@pytest.mark.parametrize("size", SIZES)
def test_fused_blocks_are_divided_each_by_its_own_rule(size: int) -> None:
    heads = Group(0, size).shards(25).scaled(4)
    full = torch.arange(116.0).reshape(116, 1)
    rule = Fused(0, (Part(100, heads), Part(16)))
    taken = [rule.take(full, rank) for rank in range(size)]
    assert torch.equal(rule.join(taken), full)
    for rank, shard in enumerate(taken):
        assert torch.equal(shard[-16:], full[100:]), "the replicated block is whole on every rank"
        assert tuple(shard.shape) == rule.local_shape(full.shape, rank)


def test_25_heads_over_2_ranks_are_13_and_12() -> None:
    assert [HeadLayout.of(Group(rank, 2), 25, 25, 64).n_local for rank in range(2)] == [13, 12]


def test_ranks_beyond_the_heads_own_none() -> None:
    assert [HeadLayout.of(Group(rank, 4), 3, 3, 16).n_local for rank in range(4)] == [1, 1, 1, 0]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_the_leaves_do_not_depend_on_the_number_of_ranks(size: int) -> None:
    for units in (3, 12, 25, 4096, 50257):
        assert Group(0, size).shards(units).borders == Group.single().shards(units).borders


def test_fast_numerics_cuts_one_leaf_per_rank() -> None:
    assert Group(0, 2, numerics="fast").shards(4096).num_leaves == 2


def test_a_replicated_rule_gives_everything_to_everyone() -> None:
    full = torch.randn(3, 4)
    assert torch.equal(Replicated().take(full, 2), full)


def test_a_shape_that_does_not_fit_its_rule_is_named() -> None:
    with pytest.raises(ConfigError, match=r"axis 0 of shape \(5, 2\) should have 6"):
        Split(0, Group.single().shards(6)).take(torch.zeros(5, 2), 0)


def test_a_group_without_a_communicator_says_so() -> None:
    with pytest.raises(CollectiveError, match="rank 1 of 4 has no communicator"):
        _ = Group(1, 4).talk


def test_a_rank_outside_its_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 4 is outside a group of 4"):
        Group(4, 4)


def test_alibi_slopes_belong_to_global_heads() -> None:
    everything = alibi_slopes(12, 8, range(12))
    assert torch.equal(alibi_slopes(12, 8, range(5, 9)), everything[5:9])
    assert torch.allclose(alibi_slopes(8, 8, range(8)), 2.0 ** -torch.arange(1.0, 9.0))


GROUPED = [(8, 1), (8, 2), (14, 2), (6, 3), (25, 5), (12, 3), (24, 6), (16, 8), (40, 10), (8, 8)]


@pytest.mark.parametrize(("n_heads", "n_kv"), GROUPED)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_a_rank_holds_the_key_value_heads_that_its_queries_read(n_heads: int, n_kv: int, size: int) -> None:
    head_dim, per_group = 6, n_heads // n_kv
    full = torch.arange(n_kv * head_dim)
    layouts = [HeadLayout.of(Group(rank, size), n_heads, n_kv, head_dim) for rank in range(size)]
    assert [head for layout in layouts for head in layout.local_ids] == list(range(n_heads))
    rule = Fused(0, (layouts[0].kv_part,))
    shards = [rule.take(full, rank) for rank in range(size)]
    assert torch.equal(rule.join(shards), full)
    for rank, (layout, shard) in enumerate(zip(layouts, shards, strict=True)):
        read = sorted({head // per_group for head in layout.local_ids})
        assert layout.kv_range(rank) == (read[0], read[-1] + 1) if read else layout.n_local_kv <= 1
        first, last = layout.kv_range(rank)
        assert shard.tolist() == list(range(first * head_dim, last * head_dim))
        if layout.n_local and (heads := layout.kv_heads(Group(rank, size))) is not None:
            spread = heads.spread(torch.arange(first, last, dtype=torch.float32).view(1, -1, 1))
            assert spread.flatten().tolist() == [head // per_group for head in layout.local_ids]
    held = sum(layout.n_local_kv for layout in layouts)
    assert held == n_kv if n_kv % size == 0 or n_kv >= 8 else held > n_kv or n_heads < size


@pytest.mark.parametrize(("n_heads", "n_kv"), GROUPED)
def test_leaves_of_grouped_heads_are_the_same_at_every_size(n_heads: int, n_kv: int) -> None:
    layouts = [HeadLayout.of(Group(0, size), n_heads, n_kv, 6) for size in range(1, 9)]
    assert len({layout.shards.borders for layout in layouts}) == 1
    assert len({layout.kv_part.shards.borders for layout in layouts if layout.kv_part.shards}) <= 1
    assert len({layout.kv_shards.borders for layout in layouts}) == 1
    counted = [
        head
        for rank in range(3)
        for head in range(*HeadLayout.of(Group(rank, 3), n_heads, n_kv, 6).kv_shards.range(rank))
    ]
    assert counted == list(range(n_kv)), "every key/value head is counted once"


def test_what_several_ranks_hold_is_answered_for_once() -> None:
    part = HeadLayout.of(Group(0, 3), 8, 2, 8).kv_part
    assert part.held == ((0, 8), (0, 16), (8, 16))
    rows = [range(*part.range(rank))[slice(*part.own(rank))] for rank in range(3)]
    assert [row for run in rows for row in run] == list(range(16))
    assert HeadLayout.of(Group(0, 2), 8, 2, 8).kv_part.held is None, "two ranks hold one each"


def test_heads_that_do_not_make_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 attention heads with 3 key/value heads: .* a divisor of 8"):
        HeadLayout.of(Group.single(), 8, 3, 4)
