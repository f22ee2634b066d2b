"""Which tokens the next step computes: of what runs, then of what waits.

Where one caller is alone, first come first: a token of each sequence that is generating, chunks of those still
reading their prompt, then new ones while tokens, slots and blocks last. Where several share, each gets its part of a
step that stays short (step_time.py): decoding rows by turns (deficit round robin), prompt tokens out of its burst
(fair_share.py), and a full engine is taken back from whoever holds the most (preemption.py).

When a generating sequence needs a block and none is free, a latest arrival gives its blocks back and is computed
again later: its tokens stay, and draws depend on positions only, so the answer does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from cluster.engine.engine_config import EngineConfig
from cluster.engine.kv_cache.beam_tables import BeamTables
from cluster.engine.kv_cache.kv_cache_manager import KVCacheManager
from cluster.engine.schedule.fair_share import FairQueue
from cluster.engine.schedule.output_processor import Counters
from cluster.engine.schedule.preemption import CallerUsage
from cluster.engine.schedule.step_time import StepTime
from cluster.engine.sequences.caller_flows import Caller, Flow
from cluster.engine.sequences.sequence import BeamGroup, Sequence

LEAST_CHUNK = 16
"""Prompt tokens that are worth a place in a step, unless fewer are left."""
BEGINNING = 128
"""Tokens of a prompt that are read in one step."""
SCORED_SHARE = 8
"""Of the scored positions of a step only one in so many where others share it."""
MAX_MISFITS = 16
"""Flows whose first sequence does not fit that one step looks at."""


class Planner:
    """Fills one step after another. `on_start` is told of each sequence that begins, or begins again."""

    def __init__(
        self, config: EngineConfig, residents: KVCacheManager, queue: FairQueue, counters: Counters, pace: StepTime,
        on_start: Callable[[Sequence], None],
    ) -> None:  # fmt: skip
        self._config, self._residents, self._queue, self._counters = config, residents, queue, counters
        self._pace, self._on_start = pace, on_start
        self.tables = BeamTables(residents, self._make_room)
        self._chosen: dict[Sequence, int] = {}
        self._tokens = self._scored = 0  # what is left of the step
        self._limited = False  # whether prompts are read out of the flows' bursts
        self._most_each = 0  # of these, in one step
        self._holdings: CallerUsage | None = None

    def choose(self) -> Mapping[Sequence, int]:
        """The sequences of the next step, and how many tokens of each."""
        self._chosen, self._scored, self._holdings = {}, self._config.max_scored_tokens, None
        self._limited = self._queue.lately_several
        if self._limited:  # whole rows of logits cost more than prompt tokens do
            self._scored = max(1, self._scored // SCORED_SHARE)
        rows = [seq for seq in self._residents.running if _decodes(seq)]
        if self._queue.several:
            rows = self._in_turn(rows)
        self._tokens = self._config.max_step_tokens - len(rows)
        self._decode(rows)
        reading = [seq for seq in self._residents.running if not _decodes(seq) and seq.target > seq.computed]
        if self._limited:
            self._share_prompts(len(rows), reading)
        for seq in reading:
            if seq.blocks:  # nobody has taken them meanwhile
                self._read(seq)
        self._start_waiting()
        return self._chosen

    # ------------------------------------------------------------ what runs

    def _in_turn(self, rows: list[Sequence]) -> list[Sequence]:
        """Of the decoding rows those whose turn it is, where all of them would make the step too long."""
        units = _units(rows)
        demands = {flow: sum(map(len, of_flow)) for flow, of_flow in units.items()}
        if len(demands) == 0:
            return rows
        demands |= dict.fromkeys(self._beginners({flow.caller for flow in demands}), 1)
        most = self._pace.rows(min(len(rows), len(demands) * min(demands.values())))
        if len(rows) <= most:
            return rows
        chosen: list[Sequence] = []
        for flow, part in divided(most, demands).items():
            if flow not in units:
                continue
            flow.rows += part
            for unit in sorted(units[flow], key=lambda unit: (unit[0].last_step, unit[0].order)):
                if len(unit) <= flow.rows:
                    flow.rows -= len(unit)
                    chosen += unit
            flow.rows = min(flow.rows, float(max(map(len, units[flow]))))
        return sorted(chosen, key=lambda seq: seq.order)

    def _beginners(self, others: set[Caller]) -> Iterator[Flow]:
        """Flows of other callers that will have a first token after this step, if it is not too long for them."""
        for seq in self._residents.running:
            if seq.flow.caller not in others and not _decodes(seq) and seq.target - seq.computed <= BEGINNING:
                yield seq.flow
        if self._residents.num_free_slots or self._residents.num_guest_slots:
            for flow in self._queue.waiting():
                head = flow.queue.head()
                if flow.caller not in others and head is not None and head.target <= BEGINNING:
                    yield flow

    def _decode(self, rows: list[Sequence]) -> None:
        size = self._residents.pool.block_size
        for seq in rows:
            if seq.blocks and (seq.computed < len(seq.blocks) * size or self._grow(seq)):
                self._chosen[seq] = 1

    def _share_prompts(self, rows: int, reading: list[Sequence]) -> None:
        """Each flow that has something to read gets its part of this step's prompt tokens."""
        wanting = {*self._queue.waiting(), *(seq.flow for seq in reading)}
        if wanting:
            self._most_each = max(LEAST_CHUNK, self._pace.burst(rows) // len(wanting))
            self._queue.refill(self._pace.prompt_tokens(rows), wanting)
            reading.sort(key=lambda seq: (seq.flow.caller.served, seq.flow.served, seq.order))

    def _read(self, seq: Sequence) -> None:
        """The next part of a prompt, as far as the budgets go."""
        count = min(self._left_for(seq), seq.target - seq.computed)
        if count <= 0 or (
            seq.computed + count > len(seq.blocks) * self._residents.pool.block_size and not self._grow(seq)
        ):
            return
        if seq.unscored:
            unscored = seq.prompt_len - 1 - max(seq.computed, len(seq.answer.prompt_logprobs))
            count = min(count, self._scored)
            self._scored -= min(count, unscored)
        if count > 0:
            self._chosen[seq] = count
            self._tokens -= count
            seq.flow.burst = max(0.0, seq.flow.burst - count)

    def _left_for(self, seq: Sequence) -> int:
        """Prompt tokens that this step has for a sequence."""
        if not self._limited:
            return self._tokens
        mine, least = (
            min(int(seq.flow.burst), self._most_each),
            min(LEAST_CHUNK, self._config.max_step_tokens, seq.target - seq.computed),
        )
        return min(self._tokens, mine) if mine >= least else 0

    # ------------------------------------------------------------ blocks

    def _grow(self, seq: Sequence) -> bool:
        """A block for one more token, if need be from another; False if the sequence itself had to give way."""
        while self._residents.pool.num_free == 0:
            self.set_aside(self._loser())
            if not seq.blocks:
                return False
        self._residents.grow(seq)
        return True

    def _make_room(self, count: int, group: BeamGroup) -> bool:
        """Blocks for beams, if need be from others; False if the search itself had to give way."""
        while self._residents.pool.num_free < count:
            victim = self._loser()
            self.set_aside(victim)
            if victim.beam is group:
                return False
        return True

    def _loser(self) -> Sequence:
        return CallerUsage(self._residents).loser() if self._queue.several else self._residents.running[-1]

    def set_aside(self, seq: Sequence) -> None:
        """Takes back what a running sequence holds; it waits, at its own place, to be computed again."""
        if seq.beam is not None:  # all of them or none
            for member in seq.beam.sequences:
                self._chosen.pop(member, None)
            self.tables.set_aside(seq.beam)
            seq = seq.beam.leader
        self._chosen.pop(seq, None)
        self._residents.release(seq)
        self._queue.push(seq)
        self._holdings = None
        self._counters.preemptions += 1
        seq.answer.preempted += 1

    # ------------------------------------------------------------ what waits

    def _start_waiting(self) -> None:
        """From the heads of the queues, one of each flow at a time. A head that does not fit lets others by, but not
        for ever."""
        misfits: list[Flow[Sequence]] = []
        while self._tokens > 0 and len(self._queue):
            started = False
            for flow in self._queue.first(self._now):
                head = flow.queue.head()
                if flow in misfits or head is None or not self._has_budget(head):
                    continue
                if self._start(head):
                    started = True
                    for other in misfits:
                        other.passed += 1
                    continue
                misfits.append(flow)
                if flow.passed >= self._config.max_sequences or len(misfits) >= MAX_MISFITS:
                    return
            if not started:
                return

    def _has_budget(self, seq: Sequence) -> bool:
        return self._left_for(seq) > 0 and not (self._scored == 0 and seq.unscored)

    def _start(self, seq: Sequence) -> bool:
        running, pool = self._residents.running, self._residents.pool
        spare = min(len(running), 1 + pool.num_blocks // 64)
        if seq.beam is not None:
            spare += self.tables.blocks_to_spread(seq.beam)
        fits = (
            self._residents.admit(seq, spare)
            or (self._is_guest(seq) and self._residents.admit(seq, spare, guest=True))
            or (self._make_way(seq, spare) and self._residents.admit(seq, spare))
        )
        if not fits:
            return False
        self._queue.start(seq)
        if self._holdings is not None:
            self._holdings.started(seq)
        self._on_start(seq)
        self._read(seq)
        return True

    def _is_guest(self, seq: Sequence) -> bool:
        """Whether it may have a slot that is kept for those who come while another has all."""
        return self._queue.several and not seq.forks and self._now().runs_nothing(seq.flow.caller)

    def _make_way(self, seq: Sequence, spare: int) -> bool:
        """Sets aside what others hold beyond their part, if that lets the sequence start."""
        if not self._queue.several:
            return False
        pool = self._residents.pool
        blocks = pool.blocks_for(seq.target)
        free = (self._residents.num_free_slots, pool.num_free - spare)
        victims = CallerUsage(self._residents).give_way(seq.flow, 1 + len(seq.forks), blocks, free)
        for victim in victims:
            self.set_aside(victim)
        return bool(victims)

    def _now(self) -> CallerUsage:
        if self._holdings is None:
            self._holdings = CallerUsage(self._residents)
        return self._holdings


def _decodes(seq: Sequence) -> bool:
    """Whether its last token alone is to be computed, and a new one follows."""
    return len(seq.tokens) - seq.computed == 1 and not seq.held and not seq.unscored


def _units(rows: list[Sequence]) -> dict[Flow[Sequence], list[list[Sequence]]]:
    """What is computed together: single sequences, and the beams of one search."""
    by_flow: dict[Flow[Sequence], dict[int, list[Sequence]]] = {}
    for seq in rows:
        name = id(seq.beam) if seq.beam is not None and seq.beam.members else id(seq)
        by_flow.setdefault(seq.flow, {}).setdefault(name, []).append(seq)
    return {flow: list(units.values()) for flow, units in by_flow.items()}


def divided(total: int, demands: Mapping[Flow[Sequence], int]) -> dict[Flow[Sequence], float]:
    """`total` by weight; what one flow does not want goes to the others."""
    parts: dict[Flow[Sequence], float] = {}
    left, weights = float(total), sum(flow.weight for flow in demands)
    for flow in sorted(demands, key=lambda flow: demands[flow] / flow.weight):
        parts[flow] = min(float(demands[flow]), left * flow.weight / weights)
        left, weights = left - parts[flow], weights - flow.weight
    return parts
