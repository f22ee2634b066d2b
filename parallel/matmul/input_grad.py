"""The backward of a product whose outputs are divided over the ranks: dX = sum over all outputs of dY W.

Blocks of outputs that are split (q, k, v by heads; columns of the MLP) are added in the one fixed tree; a replicated
block (the shared K/V head), whose dY every rank holds whole, is added once, and of one that several ranks hold each
adds its own shard. One reduction, for several layers that read the same X too; none in a group of one.
T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from parallel.errors import ConfigError
from parallel.matmul.products import Operand, Term, product, reduced_product
from parallel.ranks.group import Group
from parallel.sharding.rules import Part, VirtualShards


@dataclass(frozen=True)
class _Block:
    """A block of outputs as seen from the backward: its local columns of dY against its rows of W."""

    start: int
    stop: int
    operand: Operand
    shards: VirtualShards | None

    def term(self, grad_TN: Tensor) -> Term:
        return Term(grad_TN[:, self.start : self.stop], self.operand)


class DividedOutputs:
    """A matrix [N, K] whose rows are divided by `parts`, ready to be multiplied by dY from the left."""

    def __init__(self, parts: tuple[Part, ...], weight: Tensor, group: Group) -> None:
        self.group, self.weight = group, weight
        self.blocks = _blocks(parts, weight, group.rank)

    def input_grad(self, grad_TN: Tensor) -> Tensor:
        """[T, K], the same on every rank."""
        return summed_input_grad([(self, grad_TN)])


def summed_input_grad(pairs: Sequence[tuple[DividedOutputs, Tensor]]) -> Tensor:
    """dX of layers that read the same X: [T, K], the same on every rank. ONE reduction, however many there are."""
    blocks = [(block, block.term(grad_TN)) for outputs, grad_TN in pairs for block in outputs.blocks]
    split = [(block.shards, term) for block, term in blocks if block.shards is not None]
    leaves = {shards.num_leaves for shards, _ in split}
    if len(leaves) > 1:
        raise ConfigError(
            f"the blocks of column-parallel layers that are summed are cut into {sorted(leaves)} leaves; cut them alike"
        )
    total: Tensor | None = None
    if split:
        total = reduced_product([term for _, term in split], split[0][0], pairs[0][0].group)
    for block, term in blocks:
        if block.shards is None:
            own = product([term])
            total = own if total is None else total + own
    assert total is not None, "a linear layer has at least one block"
    return total


def _blocks(parts: tuple[Part, ...], weight: Tensor, rank: int) -> list[_Block]:
    made, start = [], 0
    for part in parts:
        own = part.own(rank) if part.shards else (0, part.size)
        rows = start + own[0], start + own[1]
        borders = part.shards.local_borders(rank) if part.shards else (0, part.size)
        made.append(_Block(*rows, Operand(weight, borders, rows=rows, transposed=True), part.shards))
        start += part.local_size(rank)
    return made
