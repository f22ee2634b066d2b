"""The key/value cache's blocks as integers: who holds which, how often, and which are free.

Blocks are counted by reference: the samples of one prompt share its full blocks, and `fork` copies only the last, partly filled one.
No tensor here. What a block holds is the scheduler's business; prefix caching keeps the keys of full blocks in `parallel` order (see
`PrefixCache`).
"""

from __future__ import annotations

from collections.abc import Sequence

from parallel.errors import ConfigError


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"{num_blocks} blocks of {block_size} tokens: a cache needs at least one block of one token")
        self.num_blocks, self.block_size = num_blocks, block_size
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the keys and values of this many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; the caller has looked at `num_free`."""
        assert count <= self.num_free, f"{count} blocks asked for with {self.num_free} free: the caller checks first"
        blocks = [self._take() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free and cannot be shared"
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> list[int]:
        """One reference less to each; returns those that nobody holds any more."""
        released = []
        for block in reversed(blocks):
            count = self._references[block] - 1
            assert count >= 0, f"block {block} was freed twice"
            self._references[block] = count
            if count == 0:
                self._give_back(block)
                released.append(block)
        return released

    def fork(self, blocks: Sequence[int], num_tokens: int) -> tuple[list[int], tuple[int, int] | None]:
        """A second table over the same `num_tokens` tokens, and the (source, target) copy it needs, if any."""
        full = num_tokens // self.block_size
        shared = list(blocks[:full])
        if num_tokens % self.block_size == 0:
            self.share(shared)
            return shared, None
        (own,) = self.allocate(1)
        self.share(shared)
        return [*shared, own], (blocks[full], own)

    def check(self) -> None:
        """The pool's invariants, for tests: every block is free or held, never both or neither."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        held = {block for block, count in enumerate(self._references) if count > 0}
        assert not free & held, f"blocks {sorted(free & held)} are free and held"
        assert len(free) + len(held) == self.num_blocks, "a block is neither free nor held"

    def _take(self) -> int:
        return self._free.pop()

    def _give_back(self, block: int) -> None:
        self._free.append(block)
