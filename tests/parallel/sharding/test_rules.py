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
    heads = Group(0, size).shards(25, unit=4)
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
