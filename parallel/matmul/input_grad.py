"""The backward of a product whose outputs are divided over the ranks: dX = sum over all outputs of dY W.

Blocks of outputs that are split (q, k, v by heads; columns of the MLP) are added in the one fixed tree; a replicated
block (the shared K/V head), whose dY every rank holds whole, is added once. One reduction, none in a group of one.
T tokens, K inputs, N outputs.
"""

from __future__ import annotations

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
        self._group, self.weight = group, weight
        self._blocks = _blocks(parts, weight, group.rank)

    def input_grad(self, grad_TN: Tensor) -> Tensor:
        """[T, K], the same on every rank."""
        split = [block for block in self._blocks if block.shards]
        total: Tensor | None = None
        if split:
            shards = split[0].shards
            assert shards is not None, "split blocks have shards"
            total = reduced_product([block.term(grad_TN) for block in split], shards, self._group)
        for block in self._blocks:
            if block.shards is None:
                own = product([block.term(grad_TN)])
                total = own if total is None else total + own
        assert total is not None, "a linear layer has at least one block"
        return total


def _blocks(parts: tuple[Part, ...], weight: Tensor, rank: int) -> list[_Block]:
    made, start = [], 0
    for part in parts:
        stop = start + part.local_size(rank)
        borders = part.shards.local_borders(rank) if part.shards else (0, part.size)
        operand = Operand(weight, borders, rows=(start, stop), transposed=True)
        made.append(_Block(start, stop, operand, part.shards))
        start = stop
    leaves = {part.shards.num_leaves for part in parts if part.shards}
    if len(leaves) > 1:
        raise ConfigError(
            f"the blocks of one column-parallel layer are cut into {sorted(leaves)} leaves; cut them alike"
        )
    return made
