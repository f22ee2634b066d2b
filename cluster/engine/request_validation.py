"""Whether a request can work at all: the rules of its fields, then whether it fits the model's context and the cache.

Every refusal names the field, what was given and the rule. `resolve` fills in what the request left open
(max_new_tokens, the seed), so that an answer can say which parameters were used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from cluster.engine.guided.grammar import guide_problems
from cluster.engine.request import (
    BeamParams,
    ModelLimits,
    Request,
    ResponseOptions,
    SamplingParams,
    StoppingCriteria,
)
from cluster.engine.rng import fresh_seed
from parallel.errors import CapacityError, RequestError

MAX_LOGPROBS = 1024
"""The most alternatives per token that one answer may carry."""
MAX_SAMPLES = 256


def validate(request: Request, limits: ModelLimits) -> None:
    """Raises RequestError for a broken rule, CapacityError for what can never fit."""
    if not isinstance(request.request_id, str) or not request.request_id:
        raise RequestError(f"request_id is {request.request_id!r}; it must be a non-empty string")
    if not request.token_ids:
        raise RequestError("the prompt has no tokens; give at least one (a beginning-of-sequence token will do)")
    _check_ids("prompt token", request.token_ids, limits.vocab_size)
    check_task(request, limits)
    _check_sampling(request.sampling, limits.vocab_size)
    _check_stopping(request.stopping, limits.vocab_size)
    _check_response(request.response)
    if not _is_number(request.priority) or abs(request.priority) > 1_000_000:
        raise RequestError(f"priority is {request.priority!r}; it must be a whole number between -1000000 and 1000000")
    if request.deadline is not None and not (_is_number(request.deadline) and request.deadline > 0):
        raise RequestError(f"deadline is {request.deadline!r} seconds; it must be above 0")
    if request.sampling.beam is not None:
        check_beams(request, request.sampling.beam)
    for field, problem in guide_problems(request.sampling, request.stopping, limits):
        raise RequestError(f"{field} {problem}")
    _check_resumed(request, limits.vocab_size)
    check_capacity(request, limits)


def check_task(request: Request, limits: ModelLimits) -> None:
    """Whether the model has the head that the request needs."""
    task = limits.task
    if request.pooling is None and task is not None and not task.has_vocabulary:
        raise RequestError(f"the model was loaded for {task.name} and has no vocabulary; it classifies and embeds only")
    if request.pooling is not None and request.pooling.head and task is None:
        raise RequestError("the model is a language model without another head; load it with task=... to classify")


def resolve(request: Request, limits: ModelLimits) -> Request:
    """The request with everything decided: max_new_tokens, and a seed if tokens are drawn."""
    sampling, stopping = request.sampling, request.stopping
    if stopping.max_new_tokens is None:
        stopping = dataclasses.replace(stopping, max_new_tokens=what_is_left(request, limits))
    if sampling.seed is None and not sampling.greedy:
        sampling = dataclasses.replace(sampling, seed=fresh_seed())
    return dataclasses.replace(request, sampling=sampling, stopping=stopping)


def room(request: Request, limits: ModelLimits) -> int:
    """How many tokens can follow the prompt. The last one needs no place: it is never fed back."""
    return min(limits.max_context, capacity_per_beam(request, limits)) + 1 - len(request.token_ids)


def what_is_left(request: Request, limits: ModelLimits) -> int:
    """How many follow where nobody said how many: as many as the checkpoint's own files say, else what prompt and
    answer together leave of the context. A prompt that fills it is still followed by the one token it predicts.
    """
    if limits.new_tokens is not None and request.stopping.max_new_tokens is None:
        return min(room(request, limits), limits.new_tokens)
    return min(room(request, limits), max(1, limits.max_context - len(request.token_ids)))


def capacity_per_beam(request: Request, limits: ModelLimits) -> int:
    """How many tokens of a sequence the cache holds: beams share the full blocks of the prompt, and divide the rest."""
    if request.sampling.beam is None:
        return limits.kv_capacity_tokens
    shared = len(request.token_ids) // limits.block_size
    left = limits.kv_capacity_tokens // limits.block_size - shared
    return (shared + max(0, left) // max(1, request.sampling.beam.width)) * limits.block_size


def check_capacity(request: Request, limits: ModelLimits) -> None:
    """Refuses what can never fit, with the numbers."""
    beam = None if request.score_only else request.sampling.beam
    for field, count in (("n", request.sampling.num_samples), ("beam.width", beam.width if beam else 0)):
        if limits.max_batch and count > limits.max_batch:
            raise CapacityError(
                f"sampling.{field} is {count}; at most engine.max_sequences = {limits.max_batch} run at once"
            )
    prompt, wanted = len(request.token_ids), request.stopping.max_new_tokens
    new = 0 if request.score_only else max(1, request.stopping.min_new_tokens) if wanted is None else wanted
    if prompt + new - 1 > limits.max_context:
        raise CapacityError(
            f"the prompt's {prompt} tokens and {new} new ones need {prompt + new - 1} positions, the model's context "
            f"holds {limits.max_context}; shorten the prompt or lower max_new_tokens"
        )
    if beam is not None and prompt + new - 1 > capacity_per_beam(request, limits):
        raise CapacityError(
            f"the prompt's {prompt} tokens and {new} new ones in {beam.width} beams need more than the key/value "
            f"cache's {limits.kv_capacity_tokens} places; lower max_new_tokens or the width, or serve with a larger "
            "engine.kv_memory_fraction or more ranks"
        )
    if prompt + new - 1 > limits.kv_capacity_tokens:
        raise CapacityError(
            f"the prompt's {prompt} tokens and {new} new ones need {prompt + new - 1} places in the key/value cache, "
            f"which has {limits.kv_capacity_tokens}; lower max_new_tokens, or serve with a larger "
            "engine.kv_memory_fraction or more ranks"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_ids(what: str, ids: Sequence[int], vocab_size: int) -> None:
    if not set(map(type, ids)) <= {int}:
        raise RequestError(f"{what} ids must be whole numbers")
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise RequestError(
            f"{what} id {wrong} is outside the vocabulary of {vocab_size}; ids run from 0 to {vocab_size - 1}"
        )


def _within(field: str, value: object, rule: str, good: bool) -> None:
    if not (_is_number(value) and good):
        raise RequestError(f"{field} is {value!r}; it must be {rule}")


def _check_sampling(given: SamplingParams, vocab_size: int) -> None:
    _within("sampling.temperature", given.temperature, "0 (greedy) or above", given.temperature >= 0)
    if given.top_k is not None:
        _within("sampling.top_k", given.top_k, "a whole number of at least 1, or left out", given.top_k >= 1)
    if given.top_p is not None:
        _within("sampling.top_p", given.top_p, "above 0 and at most 1", 0 < given.top_p <= 1)
    if given.min_p is not None:
        _within("sampling.min_p", given.min_p, "between 0 and 1", 0 <= given.min_p <= 1)
    if given.seed is not None:
        _within("sampling.seed", given.seed, "a whole number of at most 64 bits", -(2**63) <= given.seed < 2**64)
    _within("sampling.n", given.n, f"between 1 and {MAX_SAMPLES}", type(given.n) is int and 1 <= given.n <= MAX_SAMPLES)
    ngram, best_of = given.no_repeat_ngram_size, given.best_of
    _within("sampling.no_repeat_ngram_size", ngram, "a whole number, 0 for no rule", type(ngram) is int and ngram >= 0)
    if best_of is not None:
        good = type(best_of) is int and given.n <= best_of <= MAX_SAMPLES
        _within("sampling.best_of", best_of, f"between sampling.n = {given.n} and {MAX_SAMPLES}, or left out", good)
    _within("sampling.repetition_penalty", given.repetition_penalty, "above 0 (1: none)", given.repetition_penalty > 0)
    for name in ("presence_penalty", "frequency_penalty"):
        _within(f"sampling.{name}", getattr(given, name), "a finite number (0: none)", True)
    _check_ids("sampling.logit_bias token", list(given.logit_bias), vocab_size)
    if not all(map(_is_number, given.logit_bias.values())):
        wrong = next(token for token, bias in given.logit_bias.items() if not _is_number(bias))
        _within(f"sampling.logit_bias[{wrong}]", given.logit_bias[wrong], "a finite number", False)
    if given.allowed_token_ids is not None:
        _check_ids("sampling.allowed_token", given.allowed_token_ids, vocab_size)
        if not given.allowed_token_ids:
            raise RequestError(
                "sampling.allowed_token_ids is empty: no token could be drawn; leave it out to allow all"
            )
    for word in given.bad_words:
        if not word:
            raise RequestError("sampling.bad_words holds an empty word; each needs at least one token")
        _check_ids("sampling.bad_words token", word, vocab_size)


MAX_LENGTH_PENALTY = 20.0
MAX_DIVERSITY_PENALTY = 1e6


def beam_problems(given: SamplingParams, beam: BeamParams) -> Iterator[tuple[str, str]]:
    """What is wrong with a beam search, as (field of sampling, problem)."""
    if not (type(beam.width) is int and 2 <= beam.width <= MAX_SAMPLES):
        yield "beam.width", f"is {beam.width!r}; it must be between 2 and {MAX_SAMPLES} (without beams: leave beam out)"
        return
    if not (_is_number(beam.length_penalty) and abs(beam.length_penalty) <= MAX_LENGTH_PENALTY):
        yield "beam.length_penalty", f"is {beam.length_penalty!r}; it must be between -20 and 20 (0: none, 1: the mean)"
    if not (isinstance(beam.early_stopping, bool) or beam.early_stopping == "never"):
        yield "beam.early_stopping", f"is {beam.early_stopping!r}; it must be True, False or 'never'"
    if not (type(beam.groups) is int and beam.groups >= 1 and beam.width % beam.groups == 0):
        yield "beam.groups", f"is {beam.groups!r}; it must divide the width of {beam.width}"
    elif not (_is_number(beam.diversity_penalty) and 0 <= beam.diversity_penalty <= MAX_DIVERSITY_PENALTY):
        yield "beam.diversity_penalty", f"is {beam.diversity_penalty!r}; it must be between 0 and 1000000"
    elif (beam.groups > 1) != (beam.diversity_penalty > 0):
        yield (
            "beam.diversity_penalty",
            f"is {beam.diversity_penalty!r} with {beam.groups} groups; groups need one above 0 (without it all would "
            "find the same), and without groups it means nothing",
        )
    if given.n > beam.width:
        yield "n", f"is {given.n}; a search with {beam.width} beams finds at most as many sequences"
    if given.best_of is not None:
        yield "best_of", "cannot be given with beams, which are the best of their kind; sampling.n says how many"
    if given.temperature not in (0.0, 1.0):
        yield "temperature", f"is {given.temperature!r}; beams are not drawn: leave it out"
    for name in ("top_k", "top_p", "min_p"):
        if getattr(given, name) is not None:
            yield name, f"is {getattr(given, name)!r}; beams are not drawn: leave it out"


def check_beams(request: Request, beam: BeamParams) -> None:
    for field, problem in beam_problems(request.sampling, beam):
        raise RequestError(f"sampling.{field} {problem}")
    if request.score_only:
        raise RequestError("sampling.beam is set and nothing is to be generated; leave it out")
    if request.response.logprobs_temperature != 1.0:
        raise RequestError("response.logprobs_temperature is set; with beams log-probabilities are the model's own")
    if request.stopping.stop_sequences:
        raise RequestError("stopping.stop_sequences are not looked for in beams; use stop_token_ids")


def _check_stopping(given: StoppingCriteria, vocab_size: int) -> None:
    _within("stopping.min_new_tokens", given.min_new_tokens, "0 or more", given.min_new_tokens >= 0)
    _check_ids("stopping.stop_token", given.stop_token_ids, vocab_size)
    if given.max_new_tokens is None:
        return
    _within("stopping.max_new_tokens", given.max_new_tokens, "at least 1, or left out", given.max_new_tokens >= 1)
    if given.min_new_tokens > given.max_new_tokens:
        raise RequestError(
            f"stopping.min_new_tokens is {given.min_new_tokens}, above max_new_tokens {given.max_new_tokens}"
        )


def _check_response(given: ResponseOptions) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(given, name)
        if value is not None:
            _within(f"response.{name}", value, f"between 0 and {MAX_LOGPROBS}, or left out", 0 <= value <= MAX_LOGPROBS)
    _within("response.logprobs_temperature", given.logprobs_temperature, "above 0", given.logprobs_temperature > 0)


def _check_resumed(request: Request, vocab_size: int) -> None:
    samples = request.sampling.num_samples
    if len(request.resumed_ids) > samples or any(not 0 <= index < samples for index in request.finished_samples):
        raise RequestError(f"resumed_ids or finished_samples name more samples than the {samples} of sampling")
    for ids in request.resumed_ids:
        _check_ids("resumed token", ids, vocab_size)
