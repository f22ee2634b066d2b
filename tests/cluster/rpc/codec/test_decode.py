"""Messages to calls: unset is the default, zero is zero, every field arrives."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import Message

from cluster.engine.request import BeamParams, Guide, ResponseOptions, SamplingParams, StoppingCriteria
from cluster.frontend.requests.call import Call, FillInMiddle, FrontendConfig, Prompt
from cluster.request_errors import InvalidRequest
from cluster.rpc.codec.decode import generate_call, score_call
from tp_decoders.protocol import inference_pb2 as pb

CONFIG = FrontendConfig()


def test_an_empty_message_means_a_hugging_face_users_defaults() -> None:
    assert generate_call(pb.GenerateRequest(), CONFIG, None) == Call(prompts=())
    scored = score_call(pb.ScoreRequest(), CONFIG, None)
    assert scored == Call(prompts=(), score=True, response=ResponseOptions(prompt_logprobs=0))
    assert (SamplingParams().temperature, SamplingParams().n, SamplingParams().repetition_penalty) == (1.0, 1, 1.0)


def test_zeros_that_were_sent_stay_zeros() -> None:
    message = pb.GenerateRequest(
        sampling={
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 0.0,
            "min_p": 0.0,
            "seed": 0,
            "n": 0,
            "repetition_penalty": 0.0,
        },
        stopping={"max_new_tokens": 0},
        response={"logprobs": 0, "prompt_logprobs": 0, "logprobs_temperature": 0.0},
    )
    call = generate_call(message, CONFIG, None)
    assert call.sampling == SamplingParams(
        temperature=0.0, top_k=0, top_p=0.0, min_p=0.0, seed=0, n=0, repetition_penalty=0.0
    )
    assert call.stopping == StoppingCriteria(max_new_tokens=0)
    assert call.response == ResponseOptions(logprobs=0, prompt_logprobs=0, logprobs_temperature=0.0)


def full_request() -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id="id",
        prompts=[{"text": "a"}, {"token_ids": {"ids": [1, 2]}}],
        sampling={
            "temperature": 0.3, "top_k": 4, "top_p": 0.5, "min_p": 0.6, "seed": 7, "n": 8, "repetition_penalty": 0.9,
            "presence_penalty": 1.1, "frequency_penalty": 1.2, "logit_bias": {3: -1.5}, "allowed_token_ids": [1, 3],
            "bad_words": ["x"], "bad_word_ids": [{"ids": [5, 6]}],
            "no_repeat_ngram_size": 3, "best_of": 9, "no_speculation": True,
            "structured_outputs": {"json": "{}", "disable_any_whitespace": True},
            "beam": {
                "width": 6, "length_penalty": 0.7, "early_stopping": "EARLY_STOPPING_NEVER", "groups": 2,
                "diversity_penalty": 0.1,
            },
        },
        stopping={
            "max_new_tokens": 10, "min_new_tokens": 2, "stop_sequences": ["s"], "stop_token_ids": [9],
            "ignore_eos": True, "include_stop_sequence": True,
        },
        response={
            "logprobs": 1, "prompt_logprobs": 2, "token_bytes": True, "echo": True, "timings": True,
            "logprobs_temperature": 0.8,
        },
        priority=-3,
    )  # fmt: skip


def test_every_field_of_the_protocol_arrives_where_it_belongs() -> None:
    call = generate_call(full_request(), CONFIG, 12.5)
    sampling = SamplingParams(
        temperature=0.3, top_k=4, top_p=0.5, min_p=0.6, seed=7, n=8, repetition_penalty=0.9, presence_penalty=1.1,
        frequency_penalty=1.2, logit_bias={3: -1.5}, allowed_token_ids=(1, 3), bad_words=((5, 6),),
        no_repeat_ngram_size=3, best_of=9, no_speculation=True,
        guide=Guide(kind="json", text="{}", any_whitespace=False),
        beam=BeamParams(width=6, length_penalty=0.7, early_stopping="never", groups=2, diversity_penalty=0.1),
    )  # fmt: skip
    stopping = StoppingCriteria(
        max_new_tokens=10, min_new_tokens=2, stop_sequences=("s",), stop_token_ids=(9,), ignore_eos=True,
        include_stop_sequence=True,
    )  # fmt: skip
    response = ResponseOptions(
        logprobs=1, prompt_logprobs=2, token_bytes=True, echo=True, timings=True, logprobs_temperature=0.8
    )
    assert call == Call(
        prompts=(Prompt(text="a"), Prompt(token_ids=call.prompts[1].token_ids)), request_id="id", sampling=sampling,
        stopping=stopping, response=response, bad_words=("x",), priority=-3, deadline=12.5,
    )  # fmt: skip
    assert list(call.prompts[1].token_ids or ()) == [1, 2]


def test_the_request_above_sets_every_field_there_is() -> None:
    """So that a field that is added to the protocol and forgotten here is noticed."""
    left = set(unset(full_request(), ""))
    assert left == {"adapter"}, "this is refused, which another test shows"


def unset(message: Message, path: str) -> list[str]:
    names = {field.name for field, _ in message.ListFields()}
    missing = [path + field.name for field in message.DESCRIPTOR.fields if field.name not in names]
    groups = [name for name in ("sampling", "stopping", "response", "beam") if name in names]
    return missing + [name for group in groups for name in unset(getattr(message, group), f"{path}{group}.")]


def test_each_kind_of_grammar_arrives_and_none_is_refused() -> None:
    kinds: list[tuple[dict[str, Any], Guide]] = [
        ({"json_object": True}, Guide(kind="json_object")),
        ({"regex": "a"}, Guide(kind="regex", text="a")),
        ({"choice": {"texts": ["a", "日"]}}, Guide(kind="choice", text='["a", "日"]')),
        ({"grammar": "start: x"}, Guide(kind="grammar", text="start: x")),
    ]
    for sent, meant in kinds:
        message = pb.GenerateRequest(sampling={"structured_outputs": sent})
        assert generate_call(message, CONFIG, None).sampling.guide == meant
    for sent in ({}, {"json_object": False}, {"disable_any_whitespace": True}):
        with pytest.raises(InvalidRequest, match="give one of"):
            generate_call(pb.GenerateRequest(sampling={"structured_outputs": sent}), CONFIG, None)


def test_both_orders_of_a_prompt_with_a_hole_arrive_and_no_third() -> None:
    for order, first in ((None, False), ("FIM_PREFIX_FIRST", False), ("FIM_SUFFIX_FIRST", True)):
        message = pb.GenerateRequest(prompts=[{"fim": {"prefix": "a", "suffix": "b", "order": order}}])
        call = generate_call(message, CONFIG, None)
        assert call.prompts == (Prompt(fim=FillInMiddle("a", "b", suffix_first=first)),)
    with pytest.raises(InvalidRequest, match="fim.order"):
        generate_call(pb.GenerateRequest(prompts=[{"fim": {"prefix": "a", "order": 2}}]), CONFIG, None)


def test_early_stopping_is_one_of_three() -> None:
    meanings: list[tuple[int, Any]] = [(0, False), (1, True), (2, "never")]
    for sent, meant in meanings:
        call = generate_call(pb.GenerateRequest(sampling={"beam": {"width": 2, "early_stopping": sent}}), CONFIG, None)
        assert call.sampling.beam == BeamParams(width=2, early_stopping=meant)
    with pytest.raises(InvalidRequest, match="early_stopping"):
        generate_call(pb.GenerateRequest(sampling={"beam": {"width": 2, "early_stopping": 3}}), CONFIG, None)


def test_no_deadline_and_one_in_the_far_future_are_none() -> None:
    for remaining in (None, float("inf"), 3e8):
        assert generate_call(pb.GenerateRequest(), CONFIG, remaining).deadline is None
    assert generate_call(pb.GenerateRequest(), CONFIG, 0.0).deadline == 1e-3


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("prompts", pb.GenerateRequest(prompts=[{}] * 1025)),
        ("sampling.allowed_token_ids", pb.GenerateRequest(sampling={"allowed_token_ids": [1] * 65537})),
        ("sampling.logit_bias", pb.GenerateRequest(sampling={"logit_bias": dict.fromkeys(range(65537), 1.0)})),
        ("sampling.bad_word_ids", pb.GenerateRequest(sampling={"bad_word_ids": [{"ids": [1]}] * 1025})),
        ("stopping.stop_token_ids", pb.GenerateRequest(stopping={"stop_token_ids": [1] * 65537})),
        ("stopping.stop_sequences", pb.GenerateRequest(stopping={"stop_sequences": ["a"] * 65})),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lists_that_are_too_long_are_refused_before_they_are_copied(field: str, message: pb.GenerateRequest) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate_call(message, CONFIG, None)
    assert caught.value.violations[0].field == field
