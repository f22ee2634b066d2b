"""What one engine step computes, and what came out of it.

`StepPlan` is lists of integers. Its `wire` form is what travels to the other ranks: every rank keeps a mirror of each
slot's block table, so only changes are sent, and parameters of sampling never are (rank 0 alone draws). Rows whose
logits are wanted stand in four groups, because each group costs different collectives. Rows of the first two whose
request has a grammar come with the tokens that it allows (`masks`): every rank applies them to its part of the
vocabulary.

    rows    [ largest logit | to rank 0: drawn, scored with alternatives, | beams: likeliest  | scored: log-probability
              only          |            beams whose logits are changed   | tokens to rank 0  | of targets             ]
              num_argmax      num_gathered                                  num_ranked          len(targets)
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

from cluster.engine.beams.beam_search import Row
from cluster.engine.kv_cache.kv_cache_manager import TableChange
from cluster.engine.request import TokenLogprobs
from cluster.engine.sample.beam_candidates import needs_whole_rows, num_ranked
from cluster.engine.sample.pooling import PoolRun, Rows, pool_run
from cluster.engine.sequences.ahead import Ahead
from cluster.engine.sequences.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PromptScore:
    """A run of a prompt's positions whose next token's log-probability is wanted."""

    sequence: Sequence
    targets: list[int]
    top: int
    temperature: float


@dataclass(slots=True)
class StepPlan:
    """One step. Everything after `masks` stays on rank 0."""

    number: int
    tokens: list[int]
    slots: list[int]
    query_lens: list[int]
    context_lens: list[int]  # with the new tokens
    tables: list[TableChange]  # in the order in which they happened
    copies: list[tuple[int, int]]  # (source, target) blocks, before anything is written
    rows: list[int]
    num_argmax: int
    num_gathered: int
    num_ranked: int
    top_count: int  # how many tokens of each ranked row
    targets: list[int]
    temperatures: list[float] | None  # of the targets' log-probabilities, unless all are 1
    masks: list[tuple[int, bytes]] = field(default_factory=list)  # by place in `rows`: a bit for every token
    sequences: list[Sequence] = field(default_factory=list)
    drafted: dict[Sequence, int] = field(default_factory=dict)  # of its tokens, how many are guesses, the last ones
    sampled: list[Sequence] = field(default_factory=list)  # whose next token the first rows decide
    gathered_scores: list[PromptScore] = field(default_factory=list)
    plain_scores: list[PromptScore] = field(default_factory=list)
    beams: list[Sequence] = field(default_factory=list)  # gathered ones, then ranked ones
    pools: list[PoolRun] = field(default_factory=list)

    def wire(self) -> tuple[Any, ...]:
        """What the other ranks need, as plain values."""
        return (
            self.number, self.tokens, self.slots, self.query_lens, self.context_lens, self.tables, self.copies,
            self.rows, self.num_argmax, self.num_gathered, self.num_ranked, self.top_count, self.targets,
            self.temperatures, self.masks,
        )  # fmt: skip

    @staticmethod
    def from_wire(values: tuple[Any, ...]) -> StepPlan:
        return StepPlan(*values)


@dataclass(slots=True)
class StepResult:
    """What rank 0 answers. Lists run parallel to the plan's; a failed entry holds the reason instead."""

    tokens: list[int]  # per sampled sequence
    logprobs: list[TokenLogprobs | None] | None = None  # per sampled sequence, None where nobody asked
    errors: dict[int, str] = field(default_factory=dict)  # by index into the sampled sequences
    gathered_scores: list[list[TokenLogprobs] | str] = field(default_factory=list)
    plain_scores: list[list[TokenLogprobs] | str] = field(default_factory=list)
    beams: list[Row | str] = field(default_factory=list)
    pools: list[Rows | str | None] = field(default_factory=list)
    weight_version: int = 0
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0
    replayed: bool = False  # on rank 0, instead of being computed call by call


class PlanBuilder:
    """Collects the rows of one step."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens: list[int] = []
        self.slots: list[int] = []
        self.query_lens: list[int] = []
        self.context_lens: list[int] = []
        self.sequences: list[Sequence] = []
        self.drafted: dict[Sequence, int] = {}
        self._argmax: tuple[list[int], list[Sequence]] = ([], [])
        self._drawn: tuple[list[int], list[Sequence]] = ([], [])
        self._gathered_scores: tuple[list[int], list[PromptScore]] = ([], [])
        self._plain_scores: tuple[list[int], list[PromptScore]] = ([], [])
        self._pools: list[PoolRun] = []
        self._masks: dict[Sequence, bytes] = {}
        self._whole_beams: tuple[list[int], list[Sequence]] = ([], [])
        self._ranked_beams: tuple[list[int], list[Sequence]] = ([], [])

    def add(self, seq: Sequence, count: int) -> None:
        """The next `count` tokens of a sequence; a token is drawn if they are the last known ones."""
        start = seq.computed
        stop = start + count
        first_row = len(self.tokens)
        if count == 1:
            self.tokens.append(seq.tokens[start])
        else:
            self.tokens += seq.tokens[start:stop]
        self.slots.append(seq.slot)  # type: ignore[arg-type]
        self.query_lens.append(count)
        self.context_lens.append(stop)
        self.sequences.append(seq)
        if seq.scores:
            self._score(seq, start, stop, first_row)
        if seq.answer.request.pooling is not None:
            run = pool_run(seq, start, stop, first_row)
            self._pools += [] if run is None else [run]
        elif stop == len(seq.tokens) and seq.beam is not None:
            self._rank(seq, first_row + count - 1)
        elif stop == len(seq.tokens):
            rows, sampled = self._argmax if stop >= seq.greedy_from else self._drawn
            drawn = [seq, *seq.forks]
            if seq.guide is not None:
                self._masks |= dict.fromkeys(drawn, seq.guide.mask(seq.tokens))
            rows += [first_row + count - 1] * len(drawn)
            sampled += drawn

    def add_drafted(self, seq: Sequence, draft: Many[int]) -> None:
        """A sequence's last token and its draft: a token is drawn after each, as if those before it were its own."""
        first_row, count = len(self.tokens), 1 + len(draft)
        self.tokens += [seq.tokens[-1], *draft]
        self.slots.append(seq.slot)  # type: ignore[arg-type]
        self.query_lens.append(count)
        self.context_lens.append(seq.computed + count)
        self.sequences.append(seq)
        self.drafted[seq] = len(draft)
        rows, sampled = self._argmax if len(seq.tokens) >= seq.greedy_from else self._drawn
        rows += range(first_row, first_row + count)
        drawn = [seq, *(Ahead(seq, draft[:place]) for place in range(1, count))]
        sampled += drawn
        if seq.guide is not None:
            self._masks |= zip(drawn, seq.guide.masks_along(seq.tokens, draft), strict=True)

    def _rank(self, seq: Sequence, row: int) -> None:
        """A beam's last token; not a prompt's that is only computed again."""
        if seq.beam is not None and seq.beam.wants_row(seq):
            rows, beams = self._whole_beams if needs_whole_rows(seq) else self._ranked_beams
            rows.append(row)
            beams.append(seq)

    def _score(self, seq: Sequence, start: int, stop: int, first_row: int) -> None:
        done = len(seq.answer.prompt_logprobs)
        first, last = max(start, done), min(stop, seq.prompt_len - 1)
        if first >= last:
            return
        response = seq.answer.request.response
        score = PromptScore(
            seq, seq.tokens[first + 1 : last + 1], response.prompt_logprobs or 0, response.logprobs_temperature
        )
        rows, scores = self._gathered_scores if score.top else self._plain_scores
        rows.extend(range(first_row + first - start, first_row + last - start))
        scores.append(score)

    def plan(self, tables: list[TableChange], copies: list[tuple[int, int]]) -> StepPlan:
        plain, sampled = self._plain_scores[1], self._argmax[1] + self._drawn[1]
        temperatures = [s.temperature for s in plain for _ in s.targets] if plain else []
        return StepPlan(
            number=self.number,
            tokens=self.tokens,
            slots=self.slots,
            query_lens=self.query_lens,
            context_lens=self.context_lens,
            tables=tables,
            copies=copies,
            rows=self._argmax[0] + self._drawn[0] + self._gathered_scores[0] + self._whole_beams[0]
            + self._ranked_beams[0] + self._plain_scores[0],
            num_argmax=len(self._argmax[0]),
            num_gathered=len(self._drawn[0]) + len(self._gathered_scores[0]) + len(self._whole_beams[0]),
            num_ranked=len(self._ranked_beams[0]),
            top_count=max(map(num_ranked, self._ranked_beams[1]), default=0),
            targets=[target for score in plain for target in score.targets],
            temperatures=temperatures if any(t != 1.0 for t in temperatures) else None,
            sequences=self.sequences,
            drafted=self.drafted,
            sampled=sampled,
            masks=[(place, self._masks[seq]) for place, seq in enumerate(sampled) if seq in self._masks],
            gathered_scores=self._gathered_scores[1],
            plain_scores=plain,
            beams=self._whole_beams[1] + self._ranked_beams[1],
            pools=self._pools,
        )  # fmt: skip
