"""Beam search as arithmetic: which beams go on, which are finished, and when the search is over. No tensor, no block.

The rules are transformers', token for token. A hypothesis is worth sum(log-probabilities) / length ** length_penalty.
Without groups (`generate(num_beams=...)`): of all continuations, best first, those among the first `width` that end
with a stop token are finished, the first `width` that do not go on, and at the last length the first `width` are
finished as they are. With groups (`BeamSearchScorer`, `HammingDiversityLogitsProcessor`): each searches with its share
of the width, and pays `diversity_penalty` for every beam of an earlier group that took the same token in this step; a
group that has ended counts as taking end-of-text; at the last length its running beams are finished.

Equal totals go to the better beam, then to the lower token id. Unlike there, nothing that cannot happen
(log-probability minus infinity) is kept to fill up the width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cluster.engine.request import BeamParams, ModelLimits, Request, TokenLogprobs
from parallel import exact


class Candidate(NamedTuple):
    """A token that may follow: what it adds to a beam's total, and the model's own word on it where asked for."""

    token: int
    value: float
    logprob: TokenLogprobs | None


class Row(Protocol):
    """What the model says of the token after one beam."""

    def best(self, count: int, penalties: Mapping[int, float]) -> list[Candidate]:
        """At least the best `count`, and the best `count` that are not stop tokens; all finite, best first. A stop
        token further down may be missing: no search looks at it.

        `penalties` are taken off the tokens' log-probabilities.
        """
        ...


@dataclass(slots=True)
class Beam:
    """A sequence of new tokens that is still being continued."""

    tokens: list[int] = field(default_factory=list)
    total: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def followed_by(self, total: float, candidate: Candidate) -> Beam:
        logprobs = self.logprobs if candidate.logprob is None else [*self.logprobs, candidate.logprob]
        return Beam([*self.tokens, candidate.token], total, logprobs)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished sequence and its score; `stopped`: its last token is a stop token."""

    beam: Beam
    score: float
    stopped: bool


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What all groups of one search have in common. `ended_token` is what an ended group counts as taking."""

    params: BeamParams
    stop_ids: frozenset[int]
    max_new_tokens: int
    ended_token: int | None = None

    def score(self, total: float, length: int) -> float:
        return float(total / exact.power(length, self.params.length_penalty))

    def attainable(self, total: float, length: int) -> float:
        """The best score that a running beam of this total is taken to be able to reach."""
        longest = self.params.early_stopping == "never" and self.params.length_penalty > 0
        return self.score(total, self.max_new_tokens if longest else length)


class _Group:
    """Beams that compete with each other."""

    def __init__(self, rules: Rules, size: int) -> None:
        self.rules, self.size = rules, size
        self.beams = [Beam()]
        self.finished: list[Hypothesis] = []  # best first
        self.done = False

    def advance(self, rows: Many[Row], length: int, penalties: Mapping[int, float]) -> list[int]:
        """One token more; returns from which of its beams each new one goes on."""
        found = [
            (beam.total + candidate.value, place, candidate)
            for place, (beam, row) in enumerate(zip(self.beams, rows, strict=True))
            for candidate in row.best(self.size, penalties)
        ]
        found.sort(key=lambda item: (-item[0], item[1], item[2].token))
        diverse, last = self.rules.params.groups > 1, length == self.rules.max_new_tokens
        parents: list[int] = []
        running: list[Beam] = []
        for rank, (total, place, candidate) in enumerate(found):
            stops = candidate.token in self.rules.stop_ids
            ends = stops or (last and not diverse)
            if ends and rank < self.size:
                self._finish(self.beams[place].followed_by(total, candidate), length, stops)
            elif not ends and len(running) < self.size:
                running.append(self.beams[place].followed_by(total, candidate))
                parents.append(place)
        self.beams = running
        best = found[0][0] if diverse and found else running[0].total if running else None
        self.done = best is None or self._settled(best, length)
        if last and not self.done:
            for beam in running:
                self._finish(beam, length, False)
        return parents

    def _finish(self, beam: Beam, length: int, stopped: bool) -> None:
        made = Hypothesis(beam, self.rules.score(beam.total, length), stopped)
        if len(self.finished) < self.size or made.score > self.finished[-1].score:
            self.finished.append(made)
            self.finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable: of equal ones the earlier
            del self.finished[self.size :]

    def _settled(self, best: float, length: int) -> bool:
        """Whether nothing that still runs is taken to be able to become one of the best."""
        if len(self.finished) < self.size:
            return False
        early = self.rules.params.early_stopping is True
        return early or self.finished[-1].score >= self.rules.attainable(best, length)


class Search:
    """One prompt's beam search: rows in, one for each of `beams` (at first one, the prompt's), until it is `done`."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        params = rules.params
        self.groups = [_Group(rules, params.width // params.groups) for _ in range(params.groups)]
        self.length = 0

    @property
    def beams(self) -> list[Beam]:
        """What has to be computed next, group by group."""
        return [beam for group in self.groups if not group.done for beam in group.beams]

    @property
    def done(self) -> bool:
        return self.length == self.rules.max_new_tokens or all(group.done for group in self.groups)

    def advance(self, rows: Many[Row]) -> list[int]:
        """One token more for every beam; returns the row from which each of the new `beams` goes on."""
        first, start = self.length == 0, 0
        self.length += 1
        taken: Counter[int] = Counter()
        parents: list[int] = []
        for group in self.groups:
            if group.done:
                if self.rules.ended_token is not None:
                    taken[self.rules.ended_token] += group.size
                continue
            count = len(group.beams)
            price = self.rules.params.diversity_penalty
            penalties = {token: price * times for token, times in taken.items()} if price else {}
            places = group.advance(rows[start : start + count], self.length, penalties)
            taken.update(beam.tokens[-1] for beam in group.beams)
            if not group.done:
                parents += [start + place for place in places]
            start += 0 if first else count  # the prompt's one row begins every group
        return parents

    def results(self) -> list[Hypothesis]:
        """The finished sequences of all groups, best first."""
        return sorted((h for group in self.groups for h in group.finished), key=lambda hypothesis: -hypothesis.score)


def search_of(request: Request, limits: ModelLimits) -> Search:
    """The search that a resolved request asks for."""
    params, stopping = request.sampling.beam, request.stopping
    assert params is not None and stopping.max_new_tokens is not None, "a resolved request for beams"
    stops = (*(() if stopping.ignore_eos else limits.eos_token_ids), *stopping.stop_token_ids)
    return Search(
        Rules(
            params=params,
            stop_ids=frozenset(stops),
            max_new_tokens=stopping.max_new_tokens,
            ended_token=stops[0] if stops else None,
        )
    )
