"""One sample of one request while it lives in the engine, and what its samples have in common.

Plain mutable records: the scheduler owns and changes them, the sampler reads them. The tokens of a sequence are its
prompt and everything generated so far; `computed` of them have their keys and values in the cache, so a preempted
sequence is simply one with `computed` set back to 0.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Protocol

from cluster.engine.beams.beam_search import Row, Search
from cluster.engine.guided.matcher import Matcher
from cluster.engine.request import Request, Timings, TokenLogprobs
from cluster.engine.rng import stream_of
from cluster.engine.sequences.caller_flows import Flow
from cluster.engine.sequences.gathered_rows import Gathered
from cluster.engine.sequences.waiting_queue import Order


class Copied(Protocol):
    """What the sampler keeps of a sequence (logits_processors.py): a beam that goes on from it takes a copy."""

    def copy(self) -> Copied: ...


@dataclass(eq=False)
class Answer:
    """What the samples of one request share: its parameters, its clock, and the prompt's log-probabilities."""

    request: Request
    flow: Flow[Sequence]  # whose it is
    submitted: float
    deadline: float | None
    live: dict[int, Sequence] = field(default_factory=dict)  # by sample index
    started: float | None = None
    first_token: float | None = None
    preempted: int = 0  # how often blocks were given back
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_sent: bool = False
    gathered: Gathered | None = None  # of a pooled request: what its rows gave so far

    def timings(self, now: float) -> Timings:
        started = now if self.started is None else self.started
        first = now if self.first_token is None else self.first_token
        return Timings(started - self.submitted, first - self.submitted, now - self.submitted)


class Sequence:
    """One sample: tokens, table of blocks, and what decides when it ends."""

    __slots__ = (
        "adjustments", "answer", "beam", "blocks", "chain", "chained", "charged", "computed", "done", "earned", "flow",
        "forks", "greedy_from", "guide", "held", "index", "last_step", "max_tokens", "min_tokens", "order", "plain",
        "prompt_len", "request_id", "sampling", "scores", "slot", "stop_ids", "stream", "tokens", "top_logprobs",
    )  # fmt: skip

    def __init__(self, answer: Answer, index: int, order: Order, stop_ids: frozenset[int]) -> None:
        request = answer.request
        resumed = request.resumed_ids[index] if index < len(request.resumed_ids) else ()
        self.answer, self.index, self.order = answer, index, order
        self.request_id = request.request_id
        self.tokens = [*request.token_ids, *resumed]
        self.prompt_len = len(request.token_ids)
        self.computed = 0
        self.flow = answer.flow
        self.charged = 0  # tokens that its flow was charged with
        self.earned = 0  # tokens computed anew since it started
        self.last_step = 0
        self.blocks: list[int] = []
        self.chain = self.chained = 0  # what the pool remembers of this sequence: chain, and number of blocks
        self.slot: int | None = None
        self.done = False
        self.forks: list[Sequence] = []  # samples that will share this one's prompt once it is computed
        self.scores = False  # computes the prompt's log-probabilities
        self.stop_ids = stop_ids
        self.max_tokens = self.prompt_len + (request.stopping.max_new_tokens or 0)
        self.min_tokens = self.prompt_len + request.stopping.min_new_tokens
        self.sampling = request.sampling
        self.top_logprobs = request.response.logprobs
        self.stream = stream_of(request.sampling.seed or 0, index)
        if request.sampling.best_of is not None and self.top_logprobs is None:
            self.top_logprobs = 0  # they decide which samples are the best
        self.beam: BeamGroup | None = None  # the beam search that it is part of
        self.held = False  # a beam that waits until the others of its search have been computed as far as it is
        self.adjustments: Copied | None = None  # the sampler's, made at the first draw
        self.guide: Matcher | None = None  # which tokens its grammar allows
        self.plain = is_plain(request)
        # from this length on, the next token is simply the most likely one
        self.greedy_from = (self.min_tokens if stop_ids else 0) if self.plain else self.max_tokens + 1

    @property
    def target(self) -> int:
        """How many tokens have to be computed next: all, without the last if it is only scored, or held."""
        return len(self.tokens) - (self.answer.request.score_only or self.held)

    @property
    def unscored(self) -> bool:
        """Whether log-probabilities of its prompt are still to be computed."""
        return self.scores and len(self.answer.prompt_logprobs) < self.prompt_len - 1

    @property
    def read_whole(self) -> bool:
        """Whether all of its rows are wanted, so that none may come out of the cache."""
        pooling = self.answer.request.pooling
        return self.unscored or (pooling is not None and pooling.rows != "last")

    @property
    def position(self) -> int:
        """Where the token that is drawn next will stand."""
        return len(self.tokens)


class BeamGroup:
    """A search and its sequences: as many as it may have beams, the first of which reads the prompt."""

    def __init__(self, sequences: list[Sequence], search: Search) -> None:
        self.sequences, self.search = sequences, search
        self.leader = sequences[0]
        self.members: list[Sequence] = []  # one per beam, in the search's order; none while the prompt is read
        self.parents: list[int] | None = None  # the members the search's beams go on from, until tables follow
        self.prompt = list(self.leader.tokens)
        for seq in sequences:
            seq.beam = self
        self.leader.forks = sequences[1:]  # which keeps slots for them

    @property
    def reading(self) -> list[Sequence]:
        """Whose rows the search advances by."""
        return self.members or [self.leader]

    def wants_row(self, seq: Sequence) -> bool:
        """Whether something follows from its last token: not from a prompt that is read for the second time."""
        return bool(self.members) or self.search.length == 0

    def advance(self, rows: Many[Row]) -> None:
        parents = self.search.advance(rows)
        self.parents = parents if self.members else None

    def tokens_of(self, place: int) -> list[int]:
        return self.prompt + self.search.beams[place].tokens


def is_plain(request: Request) -> bool:
    """Whether every token is the largest logit and nothing else is asked: no row of logits need be gathered."""
    given = request.sampling
    untouched = not (given.logit_bias or given.bad_words or given.allowed_token_ids is not None)
    no_penalty = given.repetition_penalty == 1.0 and given.presence_penalty == 0.0 and given.frequency_penalty == 0.0
    asked = request.response.logprobs is not None or given.best_of is not None
    return given.greedy and untouched and no_penalty and not given.no_repeat_ngram_size and not asked
