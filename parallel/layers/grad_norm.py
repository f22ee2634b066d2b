"""The norm of a sharded gradient: every element counted once, in one order at every tensor-parallel size.

Each parameter's squares are summed leaf by leaf (a virtual shard of a split axis is a leaf; a replicated block is
one), the leaves in the fixed tree, the parameters in their order. Collectives: one tree_sum for each distinct
number of leaves, none in a group of one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.matmul.products import leaf_tree, uses_native
from parallel.native import elementwise
from parallel.ranks.group import Group
from parallel.sharding.rules import Fused, Replicated, Split, VirtualShards, rule_of


@dataclass(frozen=True)
class Block:
    """A run of rows (or columns) of a local tensor that this rank counts, divided among ranks or not."""

    dim: int
    start: int
    size: int
    shards: VirtualShards | None


def local_blocks(parameter: Tensor, rank: int) -> list[Block]:
    """The blocks a rank's shard is made of, by its rule."""
    rule = rule_of(parameter)
    if isinstance(rule, Split):
        return [Block(rule.dim, 0, rule.shards.local_size(rank), rule.shards)]
    if isinstance(rule, Replicated) or not parameter.dim():
        return [Block(0, 0, parameter.shape[0] if parameter.dim() else 1, None)]
    assert isinstance(rule, Fused), f"no norm is defined for sharding rule {rule}"
    blocks, start = [], 0
    for part in rule.parts:
        first, last = part.own(rank) if part.shards else (0, part.size)
        blocks.append(Block(rule.dim, start + first, last - first, part.shards))
        start += part.local_size(rank)
    return blocks


def squared_norm(parameters: Sequence[Tensor], grads: Sequence[Tensor], group: Group) -> float:
    """The sum of squares of the whole model's gradient, the same float on every rank. grads are float32, shaped as
    the local shards.
    """
    sums: list[Tensor | None] = []
    sharded: dict[int, list[tuple[int, Tensor, VirtualShards]]] = {}
    for parameter, grad in zip(parameters, grads, strict=True):
        for block in local_blocks(parameter, group.rank):
            piece = grad.narrow(block.dim, block.start, block.size) if grad.dim() else grad[None]
            if block.shards is None:
                sums.append(_square_sum(piece))
                continue
            leaves = _leaf_squares(piece, block.dim, block.shards.local_borders(group.rank))
            sharded.setdefault(block.shards.num_leaves, []).append((len(sums), leaves, block.shards))
            sums.append(None)
    for entries in sharded.values():
        totals = _tree_totals([leaves for _, leaves, _ in entries], entries[0][2], group)
        for (index, _, _), total in zip(entries, totals, strict=True):
            sums[index] = total
    known = [total for total in sums if total is not None]
    return math.fsum(torch.stack(known).tolist()) if known else 0.0  # read at once: a read waits for the device


def _leaf_squares(piece: Tensor, dim: int, borders: Sequence[int]) -> Tensor:
    sums = [_square_sum(piece.narrow(dim, lo, hi - lo)) for lo, hi in itertools.pairwise(borders)]
    return torch.stack(sums) if sums else piece.new_zeros(0)


def _square_sum(piece: Tensor) -> Tensor:
    """A float32 scalar; the copy makes the order of the sum that of the shape alone."""
    if not piece.numel():
        return piece.new_zeros(())
    flat = piece.contiguous().view(-1)
    return elementwise.square_sum(flat) if uses_native(flat) else torch.linalg.vector_norm(flat).square()


def _tree_totals(leaves: list[Tensor], shards: VirtualShards, group: Group) -> Tensor:
    roots = leaf_tree(torch.stack(leaves, 1), shards.local_nodes(group.rank))
    return roots[0] if group.size == 1 else group.talk.tree_sum(roots, shards.tree)
