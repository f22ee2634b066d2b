"""A call's costs are known before it is admitted: its answer fits a message, and lists are counted over prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import grpc
import pytest

from cluster.engine.request import ResponseOptions, SamplingParams, StoppingCriteria
from cluster.frontend.requests.call import Call, FrontendConfig
from cluster.frontend.requests.call_costs import check_answer, check_lists
from cluster.request_errors import DoesNotFit
from cluster.rpc.services.connection_limits import ServerLimits
from tests.cluster.frontend.fakes import LIMITS, FakeEngine
from tests.cluster.frontend.harness import run
from tests.cluster.frontend.requests.test_admission import admission, call
from tests.cluster.rpc.harness import info, refused, service

SMALL = 32_768
WIDE = replace(LIMITS, vocab_size=50_257, max_context=1024)
MESSAGE = ServerLimits().max_message_bytes


@pytest.mark.parametrize(
    ("method", "fields", "count"),
    [
        ("score", {"top_logprobs": 13}, 40),
        ("score", {}, 200),
        ("generate", {"stopping": {"max_new_tokens": 9}, "response": {"logprobs": 13}}, 40),
        ("generate", {"stopping": {"max_new_tokens": 9}, "sampling": {"n": 8}}, 40),
        ("generate", {"stopping": {"max_new_tokens": 9}, "response": {"token_bytes": True, "echo": True}}, 60),
        ("generate", {"stopping": {"max_new_tokens": 1}, "response": {"prompt_logprobs": 5}}, 60),
    ],
)
def test_an_answer_fits_its_message_or_the_call_is_refused_and_its_parts_are_answered(
    method: str, fields: dict[str, Any], count: int
) -> None:
    async def main() -> None:
        async with service(FakeEngine(), limits=ServerLimits(max_message_bytes=SMALL)) as s:
            prompts = [[1, 2, 3, 4, 5, 6]] * count
            error = await refused(
                getattr(s.client, method)(prompts, **fields), grpc.StatusCode.RESOURCE_EXHAUSTED, f"holds {SMALL}"
            )
            assert info(error).reason == "DOES_NOT_FIT" and s.engine.submitted == 0
            part = int(str(error).split("at most ")[1].split(" ")[0])
            assert 1 <= part < count
            answer = await getattr(s.client, method)(prompts[:part], **fields)
            assert len(answer.results) == part and answer.ByteSize() <= SMALL
            assert all(result.status.code == 0 for result in answer.results)

    run(main())


def test_a_stream_has_no_answer_that_must_fit_one_message() -> None:
    async def main() -> None:
        async with service(FakeEngine(), limits=ServerLimits(max_message_bytes=SMALL)) as s:
            chunks = s.client.stream([[1, 2]] * 40, sampling={"n": 8}, stopping={"max_new_tokens": 9})
            assert sum([len(chunk.token_ids) async for chunk in chunks]) == 40 * 8 * 9

    run(main())


def test_scores_of_many_alternatives_are_refused_before_anything_is_computed() -> None:
    asked = call(*[[5] * 1024] * 512, score=True, response=ResponseOptions(prompt_logprobs=64), answer_bytes=MESSAGE)
    made = run(admission(limits=WIDE).requests(asked))
    with pytest.raises(DoesNotFit, match=r"up to \d+ bytes .* a message holds 67108864: send at most \d+ at a time"):
        check_answer(asked, made, WIDE)
    few = replace(asked, prompts=asked.prompts[:70])
    check_answer(few, made[:70], WIDE)


@pytest.mark.parametrize(
    ("sampling", "stopping", "field"),
    [
        ({"logit_bias": dict.fromkeys(range(50_000), 0.5)}, {}, "sampling.logit_bias"),
        ({"allowed_token_ids": tuple(range(50_000))}, {}, "sampling.allowed_token_ids"),
        ({}, {"stop_token_ids": tuple(range(50_000))}, "stopping.stop_token_ids"),
        ({"bad_words": ((9,) * 1000,) * 50}, {}, "sampling.bad_words"),
    ],
)
def test_lists_are_counted_over_all_prompts(sampling: dict[str, Any], stopping: dict[str, Any], field: str) -> None:
    given: dict[str, Any] = {"sampling": SamplingParams(**sampling), "stopping": StoppingCriteria(**stopping)}
    with pytest.raises(DoesNotFit, match="50000 entries of lists for each of 1024 prompts.*at most 83 at a time") as no:
        check_lists(call(*[[1]] * 1024, **given), FrontendConfig())
    assert no.value.violations[0].field == field
    check_lists(call(*[[1]] * 83, **given), FrontendConfig())


def test_bad_words_are_bounded_together() -> None:
    with pytest.raises(DoesNotFit, match="1024000 characters and token ids in all words; at most 65536"):
        check_lists(Call(prompts=(), sampling=SamplingParams(bad_words=((9,) * 1000,) * 1024)), FrontendConfig())
    with pytest.raises(DoesNotFit, match="1048576 characters"):
        check_lists(Call(prompts=(), bad_words=("x" * 1024,) * 1024), FrontendConfig())


def test_texts_and_ids_that_would_become_too_much_are_refused_in_their_parts_not() -> None:
    async def main() -> None:
        async with service(FakeEngine(), limits=ServerLimits(max_message_bytes=SMALL)) as s:
            too_much = grpc.StatusCode.RESOURCE_EXHAUSTED
            await refused(s.client.tokenize(["ab" * 100] * 50), too_much, "send at most 32 at a time")
            assert len((await s.client.tokenize(["ab" * 100] * 32)).results) == 32
            await refused(s.client.detokenize([[3] * 100] * 40), too_much, "send at most 20 at a time")
            assert len((await s.client.detokenize([[3] * 100] * 20)).results) == 20

    run(main())
