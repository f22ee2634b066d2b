"""The rules of a call's parameters, one row per field: ranges are the table's (field_ranges.py), and what depends on
the model or on several fields at once is here. Every broken rule is reported, not just the first.

Only what does not depend on a single prompt; prompts are checked one by one in admission.py, because each has its own
status.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cluster.engine.guided.grammar import guide_problems
from cluster.engine.request import ModelLimits
from cluster.engine.request_validation import beam_problems
from cluster.frontend.requests.call import Call, FrontendConfig
from cluster.frontend.requests.classify_embed import problems
from cluster.frontend.requests.field_ranges import FIELDS
from cluster.request_errors import Violation


@dataclass(frozen=True)
class Scope:
    """What a rule may look at."""

    call: Call
    limits: ModelLimits
    config: FrontendConfig


Problem = str | None
"""None where the rule holds, else what was given and what is wanted."""
Check = Callable[[object], Problem]


def number(low: float, high: float, wanted: str) -> Check:
    """A finite number in [low, high]; True is not a number, NaN is in no range."""

    def check(value: object) -> Problem:
        ok = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return None if ok else f"{value!r} is not allowed; give {wanted}"

    return check


def whole(low: int, high: int, wanted: str) -> Check:
    """A whole number in [low, high]."""
    in_range = number(low, high, wanted)
    return lambda value: in_range(value) if isinstance(value, int) else f"{value!r} is not allowed; give {wanted}"


def ranged(message: str, field: str, kind: type[int] | type[float] = float) -> Check:
    """The rule of a field's row in the table of ranges; of a map it is about the values."""
    row = FIELDS[message][field]
    kinds = (int,) if kind is int else (int, float)

    def check(value: object) -> Problem:
        if isinstance(value, kinds) and not isinstance(value, bool):
            return row.problem(value)
        return f"{value!r} is not allowed; give {row.wanted}"

    return check


def unset_or(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def token_ids(ids: Iterable[object], vocab_size: int, most: int) -> Problem:
    """Ids of this vocabulary, not too many."""
    ids = tuple(ids)
    if len(ids) > most:
        return f"{len(ids)} entries; at most {most} are allowed"
    numbers: Any = ids if {*map(type, ids)} == {int} else (-1,)
    if not ids or (min(numbers) >= 0 and max(numbers) < vocab_size):
        return None  # three passes in C: lists may be long, and this is the event loop
    wrong = next((i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size), None)
    return None if wrong is None else f"{wrong!r} is not a token id; this model's are 0 to {vocab_size - 1}"


TEMPERATURE = ranged("ResponseOptions", "logprobs_temperature")
DRAWING_TEMPERATURE = ranged("SamplingParams", "temperature")
TOP_K = unset_or(ranged("SamplingParams", "top_k", int))
TOP_P = unset_or(ranged("SamplingParams", "top_p"))
MIN_P = unset_or(ranged("SamplingParams", "min_p"))
SEED = unset_or(ranged("SamplingParams", "seed", int))
NGRAM = ranged("SamplingParams", "no_repeat_ngram_size", int)
REPETITION = ranged("SamplingParams", "repetition_penalty")
PENALTY = ranged("SamplingParams", "presence_penalty")
BIAS, BIASES = ranged("SamplingParams", "logit_bias"), FIELDS["SamplingParams"]["logit_bias"]
MAX_NEW_TOKENS = unset_or(ranged("StoppingCriteria", "max_new_tokens", int))
PRIORITY = ranged("GenerateRequest", "priority", int)
DEADLINE = unset_or(number(1e-9, math.inf, "seconds above 0"))


def _request_id(s: Scope) -> Problem:
    length, most = len(s.call.request_id), s.config.max_request_id
    return None if length <= most else f"{length} characters; at most {most} are allowed"


def _prompts(s: Scope) -> Problem:
    count, most = len(s.call.prompts), s.config.max_prompts_per_call
    return None if 1 <= count <= most else f"{count} given; a call takes 1 to {most}"


def _n(s: Scope) -> Problem:
    most = min(s.config.max_n, s.limits.max_batch or s.config.max_n)
    return whole(1, most, f"a whole number from 1 to {most}")(s.call.sampling.n)


def _best_of(s: Scope) -> Problem:
    given, least, most = s.call.sampling.best_of, s.call.sampling.n, s.config.max_n
    most = min(most, s.limits.max_batch or most)
    return unset_or(whole(least, most, f"a whole number from n = {least} to {most}, or leave it out"))(given)


def _beams(s: Scope) -> Iterator[Violation]:
    """Of a beam search, rules that concern several fields at once."""
    beam = s.call.sampling.beam
    if beam is None:
        return
    for field, problem in beam_problems(s.call.sampling, beam):
        yield Violation(f"sampling.{field}", problem)
    most = s.limits.max_batch
    if most and beam.width > most:
        yield Violation("sampling.beam.width", f"is {beam.width}; at most {most} sequences run at once")
    if s.call.stopping.stop_sequences:
        yield Violation("stopping.stop_sequences", "are not looked for in beams; use stop_token_ids")
    if s.call.response.logprobs_temperature != 1.0:
        yield Violation("response.logprobs_temperature", "is set; with beams log-probabilities are the model's own")


def _guide(s: Scope) -> Iterator[Violation]:
    """Of a grammar, what it does not go with; whether it can be followed is looked at next."""
    guide, most = s.call.sampling.guide, s.config.max_guide_length
    for field, problem in guide_problems(s.call.sampling, s.call.stopping, s.limits):
        yield Violation(field, problem)
    if guide is not None and len(guide.text) > most:
        yield Violation(f"sampling.structured_outputs.{guide.kind}", f"{len(guide.text)} characters; at most {most}")


def _num_logprobs(value: object, s: Scope) -> Problem:
    most = min(s.config.max_logprobs, s.limits.vocab_size)
    return unset_or(whole(0, most, f"a whole number from 0 to {most}"))(value)


def _ids(ids: Iterable[object], s: Scope) -> Problem:
    return token_ids(ids, s.limits.vocab_size, s.config.max_id_list)


def _allowed(s: Scope) -> Problem:
    allowed = s.call.sampling.allowed_token_ids
    if allowed is None:
        return None
    return _ids(allowed, s) if allowed else "is an empty list, which allows nothing; leave it out to allow every token"


def _logit_bias(s: Scope) -> Problem:
    bias = s.call.sampling.logit_bias
    if {*map(type, bias.values())} == {float} and BIASES.problem_at([*bias.values()]) is None:
        return _ids(bias, s)
    wrong = ((key, BIAS(value)) for key, value in bias.items())
    return _ids(bias, s) or next((f"of token {key}: {problem}" for key, problem in wrong if problem), None)


def _bad_words(s: Scope) -> Problem:
    words, ids, longest = s.call.bad_words, s.call.sampling.bad_words, s.config.max_stop_length
    if len(words) + len(ids) > s.config.max_bad_words:
        return f"{len(words) + len(ids)} entries; at most {s.config.max_bad_words} are allowed"
    if any(len(word) > longest for word in (*words, *ids)):
        return f"one entry is longer than {longest} characters or tokens"
    if any(not word for word in (*words, *ids)):
        return "one entry is empty, which would ban everything; remove it"
    return next((problem for problem in (_ids(word, s) for word in ids) if problem), None)


def _min_new_tokens(s: Scope) -> Problem:
    given = s.call.stopping.max_new_tokens
    most = given if isinstance(given, int) and given > 0 else s.limits.max_context
    return whole(0, most, f"a whole number from 0 to {most}, the most new tokens")(s.call.stopping.min_new_tokens)


def _stop_sequences(s: Scope) -> Problem:
    stops, config = s.call.stopping.stop_sequences, s.config
    if len(stops) > config.max_stop_sequences:
        return f"{len(stops)} entries; at most {config.max_stop_sequences} are allowed"
    if any(not stop for stop in stops):
        return "one entry is empty, which would stop everything; remove it"
    longest, most = max(map(len, stops), default=0), config.max_stop_length
    return f"one has {longest} characters; at most {most} are allowed" if longest > most else None


Row = tuple[str, Callable[[Scope], Problem]]

SHARED: tuple[Row, ...] = (
    ("request_id", _request_id),
    ("priority", lambda s: PRIORITY(s.call.priority)),
    ("deadline", lambda s: DEADLINE(s.call.deadline)),
)
GENERATE: tuple[Row, ...] = (
    ("prompts", _prompts),
    ("sampling.temperature", lambda s: DRAWING_TEMPERATURE(s.call.sampling.temperature)),
    ("sampling.top_k", lambda s: TOP_K(s.call.sampling.top_k)),
    ("sampling.top_p", lambda s: TOP_P(s.call.sampling.top_p)),
    ("sampling.min_p", lambda s: MIN_P(s.call.sampling.min_p)),
    ("sampling.seed", lambda s: SEED(s.call.sampling.seed)),
    ("sampling.n", _n),
    ("sampling.best_of", _best_of),
    ("sampling.no_repeat_ngram_size", lambda s: NGRAM(s.call.sampling.no_repeat_ngram_size)),
    ("sampling.repetition_penalty", lambda s: REPETITION(s.call.sampling.repetition_penalty)),
    ("sampling.presence_penalty", lambda s: PENALTY(s.call.sampling.presence_penalty)),
    ("sampling.frequency_penalty", lambda s: PENALTY(s.call.sampling.frequency_penalty)),
    ("sampling.logit_bias", _logit_bias),
    ("sampling.allowed_token_ids", _allowed),
    ("sampling.bad_words", _bad_words),
    ("stopping.max_new_tokens", lambda s: MAX_NEW_TOKENS(s.call.stopping.max_new_tokens)),
    ("stopping.min_new_tokens", _min_new_tokens),
    ("stopping.stop_sequences", _stop_sequences),
    ("stopping.stop_token_ids", lambda s: _ids(s.call.stopping.stop_token_ids, s)),
    ("response.logprobs", lambda s: _num_logprobs(s.call.response.logprobs, s)),
    ("response.prompt_logprobs", lambda s: _num_logprobs(s.call.response.prompt_logprobs, s)),
    ("response.logprobs_temperature", lambda s: TEMPERATURE(s.call.response.logprobs_temperature)),
)
SCORE: tuple[Row, ...] = (
    ("sequences", _prompts),
    ("temperature", lambda s: TEMPERATURE(s.call.response.logprobs_temperature)),
    ("top_logprobs", lambda s: _num_logprobs(s.call.response.prompt_logprobs, s)),
)

READ: tuple[Row, ...] = (("sequences", _prompts),)


def violations(call: Call, limits: ModelLimits, config: FrontendConfig) -> Iterator[Violation]:
    """Every rule the call breaks, in the order of the table."""
    scope = Scope(call, limits, config)
    if call.reading is not None:
        yield from problems(call.reading, limits.task, len(call.prompts))
    for field, check in SHARED + (READ if call.reading else SCORE if call.score else GENERATE):
        problem = check(scope)
        if problem is not None:
            yield Violation(field, problem)
    yield from _beams(scope)
    yield from _guide(scope)
