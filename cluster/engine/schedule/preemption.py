"""What each caller holds of an engine, and who gives way to whom when it is full.

A caller's part is the larger of its parts of the slots and of the cache's blocks, by weight (dominant resource
fairness): one with few long sequences and one with many short ones are compared by what each takes most of. Between
the flows of one caller the same holds. Whoever gives way loses the sequence that came last, and never the only one,
unless that has had its quantum of tokens since it started: so everything that runs gets on, however often it is set
aside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.engine.kv_cache.kv_cache_manager import KVCacheManager
from cluster.engine.sequences.caller_flows import Caller, Flow
from cluster.engine.sequences.sequence import Sequence

QUANTUM = 256
"""Tokens computed anew that a sequence is sure of once it has started; the beams of a search have so many together."""
LEAST_QUANTUM = 8
"""Of each beam, however many there are."""


@dataclass
class Held:
    """What one caller or flow has. A beam search counts once, with all its slots."""

    slots: int = 0
    blocks: int = 0
    running: list[Sequence] = field(default_factory=list)  # the latest last; of a beam search its first


class CallerUsage:
    """Taken from what runs at the moment it is made; `give_way` and `started` keep it up to date."""

    def __init__(self, residents: KVCacheManager) -> None:
        self._num_slots, self._num_blocks = residents.max_sequences, residents.pool.num_blocks
        self._held: dict[Caller | Flow[Sequence], Held] = {}
        self._latest = residents.running[-1] if residents.running else None
        for seq in residents.running:
            self.started(seq)

    def of(self, who: Caller | Flow[Sequence]) -> float:
        """Its part of what it has most of, by weight."""
        return self._part(who, 0, 0)

    def runs_nothing(self, who: Caller | Flow) -> bool:
        held = self._held.get(who)
        return held is None or not held.running

    def started(self, seq: Sequence) -> None:
        for who in (seq.flow, seq.flow.caller):
            held = self._held.setdefault(who, Held())
            held.slots += 1 + (0 if seq.beam and seq.beam.members else len(seq.forks))
            held.blocks += len(seq.blocks)
            if seq.beam is None or seq.beam.leader is seq:
                held.running.append(seq)

    def give_way(self, flow: Flow[Sequence], slots: int, blocks: int, free: tuple[int, int]) -> list[Sequence]:
        """Which sequences to set aside so that `flow` gets that many (slots, blocks); none where that would be unfair
        or is not enough."""
        found: list[Sequence] = []
        free_slots, free_blocks = free
        while free_slots < slots or free_blocks < blocks:
            seq = next((seq for seq in self._by_part() if self._gives_way(seq, flow, slots, blocks)), None)
            if seq is None:
                return []
            gone_slots, gone_blocks = _size(seq)
            self._remove(seq, gone_slots, gone_blocks)
            free_slots, free_blocks = free_slots + gone_slots, free_blocks + gone_blocks
            found.append(seq)
        return found

    def loser(self) -> Sequence:
        """Who loses its blocks so that another may go on: the latest of whoever has the most. The first of all never
        does while there are others, so that something always ends."""
        assert self._latest is not None, "somebody holds the blocks"
        return next((seq for seq in self._by_part() if self._can_spare(seq)), self._latest)

    def _by_part(self) -> Iterable[Sequence]:
        """The latest of each flow, of the one that has the most first."""
        flows = [who for who, held in self._held.items() if isinstance(who, Flow) and held.running]
        flows.sort(key=lambda flow: (self.of(flow.caller), self.of(flow)), reverse=True)
        return (self._held[flow].running[-1] for flow in flows)

    def _can_spare(self, seq: Sequence) -> bool:
        return len(self._held[seq.flow.caller].running) > 1 or seq.earned >= _quantum(seq)

    def _gives_way(self, seq: Sequence, flow: Flow[Sequence], slots: int, blocks: int) -> bool:
        theirs: Caller | Flow[Sequence] = seq.flow if seq.flow.caller is flow.caller else seq.flow.caller
        mine: Caller | Flow[Sequence] = flow if seq.flow.caller is flow.caller else flow.caller
        if seq.flow is flow:
            return False
        mine_running = not self.runs_nothing(mine)
        if len(self._held[theirs].running) == 1:
            return not mine_running and seq.earned >= _quantum(seq) and mine.served < theirs.served
        gone_slots, gone_blocks = _size(seq)
        return not mine_running or self._part(mine, slots, blocks) <= self._part(theirs, -gone_slots, -gone_blocks)

    def _part(self, who: Caller | Flow[Sequence], slots: int, blocks: int) -> float:
        held = self._held.get(who, Held())
        weight = who.weight if isinstance(who, Caller) else 1.0
        return max((held.slots + slots) / self._num_slots, (held.blocks + blocks) / self._num_blocks) / weight

    def _remove(self, seq: Sequence, slots: int, blocks: int) -> None:
        for who in (seq.flow, seq.flow.caller):
            held = self._held[who]
            held.slots -= slots
            held.blocks -= blocks
            held.running.remove(seq)


def _quantum(seq: Sequence) -> int:
    return max(LEAST_QUANTUM, QUANTUM // max(1, _size(seq)[0]))


def _size(seq: Sequence) -> tuple[int, int]:
    """Slots and blocks that are free once it is set aside."""
    if seq.beam is None:
        return 1 + len(seq.forks), len(seq.blocks)
    members = seq.beam.members or [seq]
    return len(seq.beam.sequences), sum(len(member.blocks) for member in members)
