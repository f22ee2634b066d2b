"""The sequences that run: each holds a slot (its row in every rank's mirror of block tables) and blocks of the cache.

Bookkeeping of integers, and a record of what changed since the last plan (`take_changes`). Which sequence runs is the
scheduler's choice.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from cluster.engine.kv_cache.block_pool import ROOT, BlockPool
from cluster.engine.sequences.sequence import Sequence

by_order = attrgetter("order")


TableChange = tuple[int, int, list[int]]
"""(slot, index of the first block, blocks): these blocks now stand there in the slot's table."""


class KVCacheManager:
    """Running sequences, first come first, with their slots and blocks. `guests`: slots beside the others that only a
    sequence admitted as a guest gets."""

    def __init__(self, pool: BlockPool, max_sequences: int, prefix_caching: bool = False, guests: int = 0) -> None:
        self.pool, self.prefix_caching, self.max_sequences, self._guests = pool, prefix_caching, max_sequences, guests
        self.running: list[Sequence] = []
        self.looked_up = self.reused = 0  # tokens of sequences that were admitted; of these, found in the cache
        self._slots = list(range(max_sequences + guests - 1, -1, -1))
        self._tables: list[TableChange] = []
        self._copies: dict[int, int] = {}  # target: source

    @property
    def num_free_slots(self) -> int:
        """Without those that are kept for guests."""
        return max(0, len(self._slots) - self._guests)

    @property
    def num_guest_slots(self) -> int:
        return min(len(self._slots), self._guests)

    def admit(self, seq: Sequence, spare: int, guest: bool = False) -> bool:
        """Gives the sequence blocks for its known tokens, and slots to it and the samples that will fork from it.

        False, and nothing happens, where that would leave fewer than `spare` blocks.
        """
        needed = self.pool.blocks_for(seq.target)
        if (len(self._slots) if guest else self.num_free_slots) <= len(seq.forks) or self.pool.num_free <= spare:
            return False
        found, chain = self._found(seq)
        if self.pool.num_free - self.pool.num_kept(found) < needed - len(found) + spare:
            return False
        for sample in (seq, *seq.forks):
            sample.slot = self._slots.pop()
        self.pool.share(found)
        seq.blocks = found + self.pool.allocate(needed - len(found))
        seq.computed = len(found) * self.pool.block_size
        self.looked_up += seq.target
        self.reused += seq.computed
        seq.chain, seq.chained = chain, len(found)
        self._tables.append((seq.slot, 0, list(seq.blocks)))  # type: ignore[arg-type]
        insort(self.running, seq, key=by_order)
        return True

    def _found(self, seq: Sequence) -> tuple[list[int], int]:
        """What is remembered of the sequence's start; one token is always left to compute, and all that are scored."""
        if not self.prefix_caching or seq.read_whole:
            return [], ROOT
        return self.pool.find(seq.tokens, (seq.target - 1) // self.pool.block_size)

    def remember(self, seq: Sequence) -> None:
        """Blocks that have become full may serve other sequences with the same start."""
        size = self.pool.block_size
        while (seq.chained + 1) * size <= seq.computed:
            first = seq.chained * size
            seq.chain = self.pool.remember(seq.blocks[seq.chained], seq.chain, seq.tokens[first : first + size])
            seq.chained += 1

    def grow(self, seq: Sequence) -> None:
        """One more block at the end of the table."""
        (block,) = self.pool.allocate(1)
        self._tables.append((seq.slot, len(seq.blocks), [block]))  # type: ignore[arg-type]
        seq.blocks.append(block)

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Lets the child, which has a slot, run on from its parent's computed tokens; False if no block is left."""
        if self.pool.num_free == 0:
            self._slots.append(child.slot)  # type: ignore[arg-type]
            child.slot = None
            return False
        child.blocks, copy = self.pool.fork(parent.blocks, parent.computed)
        if copy is not None:
            self._copies[copy[1]] = copy[0]
        child.computed = parent.computed
        child.chain, child.chained = parent.chain, parent.chained
        self._tables.append((child.slot, 0, list(child.blocks)))  # type: ignore[arg-type]
        insort(self.running, child, key=by_order)
        return True

    def release(self, seq: Sequence) -> None:
        """Takes back everything the sequence and its unborn forks hold; nothing happens to one that holds nothing."""
        for sample in (seq, *seq.forks):
            if sample.slot is not None:
                self._slots.append(sample.slot)
                sample.slot = None
        self.clear(seq)

    def clear(self, seq: Sequence) -> None:
        """Takes back its blocks; it keeps its slot."""
        if seq.blocks:
            self.running.remove(seq)
            for block in self.pool.free(seq.blocks):
                self._copies.pop(block, None)
            seq.blocks = []
        seq.computed = seq.chained = 0

    def take_changes(self) -> tuple[list[TableChange], list[tuple[int, int]]]:
        """What the ranks' mirrors have to be told before the next step: changed tables, and blocks to copy."""
        tables, copies = self._tables, [(source, target) for target, source in self._copies.items()]
        self._tables, self._copies = [], {}
        return tables, copies

    def check(self) -> None:
        """Invariants, for tests."""
        self.pool.check()
        assert self.running == sorted(self.running, key=by_order), "running sequences are out of order"
        held = sum(len(seq.blocks) for seq in self.running)
        assert held >= self.pool.num_blocks - self.pool.num_free, "blocks are held by no running sequence"
