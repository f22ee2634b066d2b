"""What is refused, at once, with the field and the numbers; and what a request becomes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from cluster.engine.request import ModelLimits, Request, ResponseOptions, SamplingParams, StoppingCriteria
from cluster.engine.request_validation import resolve
from cluster.frontend.output.output_text import FimTokens, fim_tokens
from cluster.frontend.requests.admission import Admission
from cluster.frontend.requests.call import Call, FillInMiddle, FrontendConfig, Prompt
from cluster.request_errors import InvalidRequest, NoTokenizer
from parallel.errors import CapacityError, QueueFull, RequestError
from tests.cluster.frontend.fakes import CODEC, LIMITS, PieceTokenizer
from tests.cluster.frontend.harness import call, run

NAN, INF = math.nan, math.inf

WRONG: list[tuple[str, dict[str, Any]]] = [
    ("sampling.temperature", {"temperature": value}) for value in (-1.0, NAN, INF, -INF, 1e-9, 1e9, True, "1")
]
WRONG += [("sampling.top_p", {"top_p": value}) for value in (0.0, -0.5, 1.01, NAN, INF)]
WRONG += [("sampling.top_k", {"top_k": value}) for value in (0, -1, 2.5, 2**40)]
WRONG += [("sampling.min_p", {"min_p": value}) for value in (-0.1, 1.5, NAN)]
WRONG += [("sampling.seed", {"seed": value}) for value in (-1, 2**63, 1.5, True)]
WRONG += [("sampling.n", {"n": value}) for value in (0, -3, 65, 1.0)]
WRONG += [("sampling.repetition_penalty", {"repetition_penalty": value}) for value in (0.0, -1.0, NAN, 1e9)]
WRONG += [("sampling.presence_penalty", {"presence_penalty": value}) for value in (NAN, INF, 1e9)]
WRONG += [("sampling.frequency_penalty", {"frequency_penalty": value}) for value in (NAN, -INF)]
WRONG += [("sampling.logit_bias", {"logit_bias": value}) for value in ({0: NAN}, {99: 1.0}, {-1: 1.0}, {0: INF})]
WRONG += [("sampling.allowed_token_ids", {"allowed_token_ids": value}) for value in ((), (99,), (-1,))]
WRONG += [("sampling.bad_words", {"bad_words": value}) for value in (((),), ((99,),))]


@pytest.mark.parametrize(("field", "sampling"), WRONG, ids=str)
def test_a_sampling_parameter_out_of_range_is_refused_by_name(field: str, sampling: dict[str, Any]) -> None:
    error = refused(call([1], sampling=replace(SamplingParams(), **sampling)))
    assert [violation.field for violation in error.violations] == [field]
    assert field in str(error)


@pytest.mark.parametrize(
    ("field", "stopping"),
    [
        ("stopping.max_new_tokens", {"max_new_tokens": 0}),
        ("stopping.max_new_tokens", {"max_new_tokens": -4}),
        ("stopping.min_new_tokens", {"min_new_tokens": 9, "max_new_tokens": 8}),
        ("stopping.min_new_tokens", {"min_new_tokens": -1}),
        ("stopping.stop_sequences", {"stop_sequences": ("",)}),
        ("stopping.stop_sequences", {"stop_sequences": ("a" * 1025,)}),
        ("stopping.stop_sequences", {"stop_sequences": ("a",) * 65}),
        ("stopping.stop_token_ids", {"stop_token_ids": (99,)}),
    ],
)
def test_a_stopping_rule_that_cannot_work_is_refused_by_name(field: str, stopping: dict[str, Any]) -> None:
    error = refused(call([1], stopping=replace(StoppingCriteria(), **stopping)))
    assert [violation.field for violation in error.violations] == [field]


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("response.logprobs", call([1], response=ResponseOptions(logprobs=14))),
        ("response.prompt_logprobs", call([1], response=ResponseOptions(prompt_logprobs=-1))),
        ("response.logprobs_temperature", call([1], response=ResponseOptions(logprobs_temperature=0.0))),
        (
            "temperature",
            call([1, 2], score=True, response=ResponseOptions(prompt_logprobs=0, logprobs_temperature=NAN)),
        ),
        ("top_logprobs", call([1, 2], score=True, response=ResponseOptions(prompt_logprobs=99))),
        ("request_id", call([1], request_id="x" * 257)),
        ("priority", call([1], priority=10**9)),
        ("deadline", call([1], deadline=NAN)),
        ("deadline", call([1], deadline=0.0)),
        ("prompts", call()),
        ("sequences", call(score=True)),
        ("prompts", call(*([[1]] * 1025))),
        ("sampling.bad_words", call([1], bad_words=("a",) * 1025)),
    ],
)
def test_everything_else_out_of_range_is_refused_by_name(field: str, asked: Call) -> None:
    assert [violation.field for violation in refused(asked).violations] == [field]


def test_all_broken_rules_are_named_at_once() -> None:
    wrong = call([1], sampling=SamplingParams(temperature=NAN, top_p=2.0), stopping=StoppingCriteria(max_new_tokens=0))
    fields = [violation.field for violation in refused(wrong).violations]
    assert fields == ["sampling.temperature", "sampling.top_p", "stopping.max_new_tokens"]


def test_values_at_the_ends_of_the_ranges_are_taken() -> None:
    for sampling in (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0, top_p=1.0, min_p=0.0, top_k=1, seed=0),
        SamplingParams(seed=2**63 - 1, n=64, logit_bias={12: -1e4}, allowed_token_ids=(0,), min_p=1.0),
    ):
        admission().check(call([1], sampling=sampling))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt(token_ids=()), "0 tokens; give at least 1"),
        (Prompt(token_ids=(1, 99)), "99 is not a token id"),
        (Prompt(token_ids=(13,)), "13 is not a token id; this model's are 0 to 12"),
        (Prompt(token_ids=(-1,)), "-1 is not a token id"),
        (Prompt(), "exactly one"),
        (Prompt(text="a", token_ids=(1,)), "exactly one"),
        (Prompt(text=""), "0 tokens"),
    ],
)
def test_a_prompt_that_cannot_work_fails_alone_and_says_why(prompt: Prompt, words: str) -> None:
    good = Prompt(token_ids=(1, 2))
    made = run(admission().requests(Call(prompts=(good, prompt, good))))
    assert isinstance(made[1], InvalidRequest)
    assert made[1].violations[0].field == "prompts[1]"
    assert words in str(made[1])
    assert isinstance(made[0], Request) and isinstance(made[2], Request)


def test_a_prompt_that_fits_the_context_but_never_the_cache_is_refused_with_both_numbers() -> None:
    small = ModelLimits(vocab_size=13, max_context=256, kv_capacity_tokens=32)
    (made,) = run(admission(limits=small).requests(call([1] * 100)))
    assert isinstance(made, CapacityError)
    assert "100 tokens" in str(made) and "32" in str(made)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt(token_ids=(1,) * 257), "257 tokens are too long: the context is 256"),
        (Prompt(text="a" * 40_000), "40000 characters"),
    ],
)
def test_a_prompt_that_is_longer_than_the_context_does_not_fit(prompt: Prompt, words: str) -> None:
    good, bad = run(admission().requests(Call(prompts=(Prompt(token_ids=(1,)), prompt))))
    assert isinstance(good, Request)
    assert isinstance(bad, CapacityError) and not isinstance(bad, QueueFull)
    assert "prompts[1]" in str(bad) and words in str(bad)


def test_fill_in_the_middle_tokens_are_found_by_either_spelling_and_only_all_together() -> None:
    santa = {"<fim-prefix>": 1, "<fim-suffix>": 3, "<fim-middle>": 2}
    star = {"<fim_prefix>": 4, "<fim_suffix>": 6, "<fim_middle>": 5}
    assert fim_tokens(santa.get) == FimTokens(1, 3, 2)
    assert fim_tokens(star.get) == FimTokens(4, 6, 5)
    assert fim_tokens({"<fim_prefix>": 4, "<fim_suffix>": 6}.get) is None


def test_what_was_left_open_is_decided_and_what_is_too_much_is_cut() -> None:
    (open_ended,) = run(admission().requests(call([1] * 10, stopping=StoppingCriteria(), sampling=SamplingParams())))
    (too_much,) = run(admission().requests(call([1] * 10, stopping=StoppingCriteria(max_new_tokens=10_000))))
    assert isinstance(open_ended, Request) and isinstance(too_much, Request)
    assert open_ended.stopping.max_new_tokens == too_much.stopping.max_new_tokens
    assert open_ended.stopping.max_new_tokens == 246
    assert open_ended.sampling.seed is not None


@pytest.mark.parametrize(("length", "new"), [(1, 255), (2, 254), (255, 1), (256, 1)])
def test_prompt_and_answer_together_fill_the_context(length: int, new: int) -> None:
    """One that fills it alone is followed by the one token that it predicts."""
    for most in (None, 10_000):
        (made,) = run(admission().requests(call([1] * length, stopping=StoppingCriteria(max_new_tokens=most))))
        assert isinstance(made, Request) and made.stopping.max_new_tokens == new
    fits = 257 - length  # the last token needs no place
    (made,) = run(admission().requests(call([1] * length, stopping=StoppingCriteria(max_new_tokens=fits))))
    assert isinstance(made, Request) and made.stopping.max_new_tokens == fits


def test_prompts_of_one_call_get_different_seeds_unless_one_is_given() -> None:
    drawn = run(admission().requests(call([1], [1], sampling=SamplingParams())))
    given = run(admission().requests(call([1], [1], sampling=SamplingParams(seed=5))))
    assert len({item.sampling.seed for item in drawn if isinstance(item, Request)}) == 2
    assert [item.sampling.seed for item in given if isinstance(item, Request)] == [5, 5]


def test_without_a_tokenizer_token_ids_work_and_everything_textual_says_so() -> None:
    bare = admission(codec=None)
    made = run(bare.requests(call([1], "a")))
    assert isinstance(made[0], Request)
    assert isinstance(made[1], NoTokenizer) and "prompts[1]" in str(made[1]) and "token ids" in str(made[1])
    for asked in (
        call([1], bad_words=("a",)),
        call([1], stopping=StoppingCriteria(stop_sequences=("a",))),
        call([1], response=ResponseOptions(token_bytes=True)),
    ):
        with pytest.raises(NoTokenizer):
            bare.check(asked)


def test_bad_words_are_banned_with_and_without_a_leading_space() -> None:
    (made,) = run(admission().requests(call([1], bad_words=("ab",))))
    assert isinstance(made, Request)
    assert made.sampling.bad_words == ((3,), (5, 3))


def admission(limits: ModelLimits = LIMITS, codec: Any = CODEC) -> Admission:
    return Admission(limits=limits, config=FrontendConfig(), codec=codec)


def refused(asked: Call) -> InvalidRequest:
    with pytest.raises(RequestError) as caught:
        admission().check(asked)
    assert isinstance(caught.value, InvalidRequest)
    return caught.value


class FirstTokenTokenizer(PieceTokenizer):
    """Begins and ends every text with a token, as its files may ask for."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = super().encode(text)
        return [FIRST, *ids, FIRST] if add_special_tokens else ids


FIRST = 7
FIRST_CODEC = replace(CODEC, tokenizer=FirstTokenTokenizer(), fim=FimTokens(8, 9, 10), first_ids=(FIRST,))


def ids_of(made: list[Request | RequestError]) -> tuple[int, ...]:
    (request,) = made
    assert isinstance(request, Request)
    return request.token_ids


@pytest.mark.parametrize(
    ("suffix_first", "wanted"), [(False, (7, 8, 0, 9, 1, 10)), (True, (7, 8, 9, 1, 10, 0))], ids=["prefix", "suffix"]
)
def test_the_first_token_comes_once_before_a_text_with_a_hole(suffix_first: bool, wanted: tuple[int, ...]) -> None:
    hole = Prompt(fim=FillInMiddle("a", "b", suffix_first))
    admission = Admission(limits=LIMITS, config=FrontendConfig(), codec=FIRST_CODEC)
    assert ids_of(run(admission.requests(Call(prompts=(hole,))))) == wanted


def test_bad_words_are_banned_without_the_first_and_last_token_of_a_text() -> None:
    admission = Admission(limits=LIMITS, config=FrontendConfig(), codec=FIRST_CODEC)
    made = run(admission.requests(Call(prompts=(Prompt(text="a"),), bad_words=("abx",))))
    assert ids_of(made) == (7, 0, 7)
    (request,) = made
    assert isinstance(request, Request)
    assert request.sampling.bad_words == ((3, 8), (5, 3, 8))


@pytest.mark.parametrize("prompt", [Prompt(text="a é"), Prompt(fim=FillInMiddle("a", "é"))], ids=["text", "fim"])
def test_a_text_whose_tokens_the_model_does_not_have_is_refused_with_the_token(prompt: Prompt) -> None:
    codec = replace(CODEC, fim=FimTokens(7, 8, 9))
    admission = Admission(limits=replace(LIMITS, vocab_size=10), config=FrontendConfig(), codec=codec)
    refused, other = run(admission.requests(Call(prompts=(prompt, Prompt(text="a")))))
    assert isinstance(refused, InvalidRequest)
    assert "prompts[0]" in str(refused)
    assert "'é', which is token 10 of the tokenizer; this model's are 0 to 9" in str(refused)
    assert isinstance(other, Request)


def test_a_bad_word_whose_tokens_the_model_does_not_have_is_refused_by_name() -> None:
    admission = Admission(limits=replace(LIMITS, vocab_size=10), config=FrontendConfig(), codec=CODEC)
    with pytest.raises(InvalidRequest, match=r"sampling.bad_words: holds 'é'"):
        run(admission.requests(Call(prompts=(Prompt(text="a"),), bad_words=("é",))))


def test_an_answers_length_is_the_checkpoints_own_where_a_call_gives_none() -> None:
    limits = ModelLimits(vocab_size=13, max_context=11, kv_capacity_tokens=32, new_tokens=6)
    request = Request(request_id="r", token_ids=(1,) * 6)
    assert resolve(request, limits).stopping.max_new_tokens == 6
    assert resolve(replace(request, token_ids=(1,) * 9), limits).stopping.max_new_tokens == 3
    given = replace(request, stopping=StoppingCriteria(max_new_tokens=2))
    assert resolve(given, limits).stopping.max_new_tokens == 2
    assert resolve(request, replace(limits, new_tokens=None)).stopping.max_new_tokens == 5
