"""The reduction tree: shape, ownership, and that its result does not depend on who owns what."""

import pytest
import torch

from parallel.errors import ConfigError
from parallel.sharding.tree import ReductionTree, even_runs, leaves_sum


@pytest.mark.parametrize("num_leaves", range(1, 18))
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 7, 8, 16])
def test_the_tree_adds_up_alike_for_every_number_of_ranks(num_leaves: int, num_ranks: int) -> None:
    leaves = torch.randn(num_leaves, 33) * 10 ** torch.arange(33.0).sub(16)
    tree = ReductionTree.over(num_leaves, num_ranks)
    roots = [leaves_sum(leaves[lo:hi].unbind()) for rank in range(num_ranks) for lo, hi in tree.nodes(rank)]
    assert torch.equal(tree.finish(roots), leaves_sum(leaves.unbind()))


def test_nodes_are_the_maximal_complete_subtrees_of_a_run() -> None:
    tree = ReductionTree.over(8, 3)
    assert [tree.nodes(rank) for rank in range(3)] == [((0, 2), (2, 3)), ((3, 4), (4, 6)), ((6, 8),)]
    assert tree.program() == (0, 1, 2, -1, -1, 3, 4, -1, -1)


def test_a_different_order_of_addition_gives_other_bits() -> None:
    leaves = torch.randn(8, 1000)
    one_by_one = leaves[0]
    for leaf in leaves[1:]:
        one_by_one = one_by_one + leaf
    assert not torch.equal(one_by_one, leaves_sum(leaves.unbind())), "then this suite could not see a wrong order"


def test_runs_are_even_and_may_be_empty() -> None:
    assert even_runs(8, 3) == ((0, 3), (3, 6), (6, 8))
    assert even_runs(3, 4) == ((0, 1), (1, 2), (2, 3), (3, 3))


def test_runs_with_gaps_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not cover 4 leaves"):
        ReductionTree(4, ((0, 2), (3, 4)))
