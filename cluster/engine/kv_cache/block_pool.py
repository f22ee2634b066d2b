"""The key/value cache's blocks as integers: who holds which, how often, which are free, and what full ones hold.

Blocks are counted by reference: the samples of one prompt share its full blocks, and `fork` copies only the last,
partly filled one. A full block may be remembered by what it holds (a chain of token runs from the start of a
sequence); nobody holding it, it stays until its place is needed, the longest unused first. No tensor here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from parallel.errors import ConfigError

ROOT = 0
"""The chain before a sequence's first block."""
Link = tuple[int, tuple[int, ...]]
"""One block's content: the chain before it, and its tokens. Compared in full, so nothing is ever mistaken for it."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(
                f"{num_blocks} blocks of {block_size} tokens: a cache needs at least one block of one token"
            )
        self.num_blocks, self.block_size = num_blocks, block_size
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # free, and holding nothing known
        self._kept: OrderedDict[int, None] = OrderedDict()  # free, but remembered; longest unused first
        self._links: dict[int, Link] = {}  # by block
        self._known: dict[Link, tuple[int, int]] = {}  # chain up to and with this link, block
        self._chains = ROOT

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._kept)

    @property
    def num_remembered(self) -> int:
        """Free ones that still hold the start of some sequence."""
        return len(self._kept)

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
        """One more reference to each, which somebody holds or which are remembered."""
        for block in blocks:
            if self._references[block] == 0:
                assert block in self._kept, f"block {block} is free and holds nothing"
                del self._kept[block]
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> list[int]:
        """One reference less to each; returns those that nobody holds any more."""
        released = []
        for block in reversed(blocks):  # so that the start of a sequence is kept the longest
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

    def find(self, tokens: Sequence[int], most: int) -> tuple[list[int], int]:
        """The remembered blocks that hold the sequence's first tokens, at most `most`, and the chain they make."""
        blocks: list[int] = []
        chain, size = ROOT, self.block_size
        while len(blocks) < most:
            start = len(blocks) * size
            known = self._known.get((chain, tuple(tokens[start : start + size])))
            if known is None:
                break
            chain = known[0]
            blocks.append(known[1])
        return blocks, chain

    def remember(self, block: int, chain: int, tokens: Sequence[int]) -> int:
        """A held block is now full of `tokens` after `chain`; returns the chain that includes it."""
        link = (chain, tuple(tokens))
        known = self._known.get(link)
        if known is not None:
            return known[0]
        self._chains += 1
        self._links[block] = link
        self._known[link] = (self._chains, block)
        return self._chains

    def forget(self) -> None:
        """What blocks hold is of no use any more: the weights have changed."""
        self._free += self._kept
        self._kept.clear()
        self._links.clear()
        self._known.clear()

    def num_kept(self, blocks: Sequence[int]) -> int:
        """How many of these are counted as free."""
        return sum(block in self._kept for block in blocks)

    def check(self) -> None:
        """The pool's invariants, for tests: every block is free or held, never both or neither."""
        free = {*self._free, *self._kept}
        assert len(free) == self.num_free, "a block is free twice"
        held = {block for block, count in enumerate(self._references) if count > 0}
        assert not free & held, f"blocks {sorted(free & held)} are free and held"
        assert len(free) + len(held) == self.num_blocks, "a block is neither free nor held"
        assert {block: link for link, (_, block) in self._known.items()} == self._links, "what is remembered is at odds"
        assert not set(self._free) & set(self._links), "a block without content is remembered"

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._kept.popitem(last=False)
        del self._known[self._links.pop(block)]
        return block

    def _give_back(self, block: int) -> None:
        if block in self._links:
            self._kept[block] = None
        else:
            self._free.append(block)
