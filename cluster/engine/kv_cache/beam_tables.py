"""The sequences of one beam search in the cache: how beams share blocks, move between tables, and leave together.

    prompt      read once, by the first sequence; then every beam gets a table over the same full blocks
    a step      beams nobody goes on from give their blocks back; of the others the first to go on keeps the table,
                each further one shares the full blocks and gets a copy of the partly filled last one
    set aside   all or nothing: the prompt is read again, the beams' own tokens are computed again, and the search
                goes on where it was

Every table is settled before a step is planned, with all the blocks it needs in that step: planning never stops
half-way through the beams of a search. Which beams there are is decided in cluster.engine.beams.beam_search.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.engine.kv_cache.kv_cache_manager import KVCacheManager
from cluster.engine.sequences.sequence import BeamGroup, Sequence


class BeamTables:
    """Settles tables over the cache. `make_room(count, group)` sets others aside until that many blocks are free;
    False: the group itself was set aside."""

    def __init__(self, residents: KVCacheManager, make_room: Callable[[int, BeamGroup], bool]) -> None:
        self._residents, self._make_room = residents, make_room

    def blocks_to_spread(self, group: BeamGroup) -> int:
        """How many blocks the beams will need once the prompt is read, beyond the prompt's own."""
        pool, prompt = self._residents.pool, len(group.prompt)
        beams = group.search.beams if group.search.length else []
        if not beams:
            width, longest = len(group.sequences), prompt + min(1, group.search.rules.max_new_tokens - 1)
        else:
            width, longest = len(beams), prompt + len(beams[0].tokens)
        shared, partial = prompt // pool.block_size, prompt % pool.block_size > 0
        return width * (pool.blocks_for(longest) - shared) - partial

    def settle(self, group: BeamGroup) -> None:
        """Before a step: every beam of a running search has its table, with room for what it computes."""
        if not group.members:
            if group.search.length and group.leader.computed == len(group.prompt):
                self._spread(group)
        elif group.parents is not None:
            self._rearrange(group, group.parents)
        elif group.leader.held and all(len(seq.tokens) - seq.computed == 1 for seq in group.members):
            _hold(group, False)

    def set_aside(self, group: BeamGroup) -> None:
        """Takes back everything it holds; what the search knows stays."""
        self.release(group)
        _hold(group, False)
        group.members, group.parents = [], None
        group.leader.tokens = list(group.prompt)
        group.leader.forks = group.sequences[1:]

    def release(self, group: BeamGroup) -> None:
        for seq in group.sequences:
            seq.forks, seq.adjustments = [], None
            self._residents.release(seq)

    def _spread(self, group: BeamGroup) -> None:
        """From the one that has read the prompt to a table for each beam."""
        if not self._make_room(self.blocks_to_spread(group), group):
            return
        group.leader.forks = []
        group.members = group.sequences[: len(group.search.beams)]
        for seq in group.members[1:]:
            self._residents.fork(group.leader, seq)
        for place, seq in enumerate(group.members):
            seq.tokens, seq.adjustments = group.tokens_of(place), None
            self._grow(seq)
        _hold(group, len(group.leader.tokens) - group.leader.computed > 1)

    def _rearrange(self, group: BeamGroup, parents: list[int]) -> None:
        """Tables follow the search's choice of who goes on."""
        old, block_size = group.members, self._residents.pool.block_size
        kept = {old[place] for place in parents}
        computed = old[0].computed
        for seq in old:
            if seq not in kept:
                self._residents.clear(seq)
        births = len(parents) - len(kept)
        if not self._make_room(births if computed % block_size else len(parents), group):
            return
        spare = [seq for seq in group.sequences if seq not in kept]
        group.members, group.parents = [], None
        for place, parent in enumerate(parents):
            seq, beam = old[parent], group.search.beams[place]
            if seq in kept:
                kept.discard(seq)
                seq.tokens.append(beam.tokens[-1])
            else:
                child = spare.pop()
                self._residents.fork(seq, child)
                child.tokens = group.tokens_of(place)
                child.adjustments = None if seq.adjustments is None else seq.adjustments.copy()
                seq = child
            group.members.append(seq)
        for seq in group.members:
            self._grow(seq)

    def _grow(self, seq: Sequence) -> None:
        """Blocks for all of its tokens, which are free."""
        while len(seq.blocks) < self._residents.pool.blocks_for(len(seq.tokens)):
            self._residents.grow(seq)


def _hold(group: BeamGroup, held: bool) -> None:
    for seq in group.sequences:
        seq.held = held
