"""The service over a real local gRPC server: answers, errors with details, health, reflection, control."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest
from grpc_health.v1 import health_pb2

from cluster.frontend.output.output_text import FimTokens
from cluster.rpc.client.client import ServiceError
from tests.cluster.frontend.fakes import CODEC, FakeEngine, scores_of, tokens_of
from tests.cluster.frontend.harness import run
from tests.cluster.rpc.harness import info, refused, service
from tp_decoders.protocol import inference_pb2

Health = health_pb2.HealthCheckResponse


def test_generate_answers_every_prompt_with_samples_parameters_and_what_was_asked_for() -> None:
    async def main() -> None:
        async with service() as s:
            answer = await s.client.generate(
                [[1, 2], "ab a"],
                request_id="mine",
                sampling={"seed": 5, "n": 2, "temperature": 0.7},
                stopping={"max_new_tokens": 6},
                response={"logprobs": 1, "prompt_logprobs": 1, "token_bytes": True, "echo": True, "timings": True},
            )
            assert answer.request_id == "mine" and [r.prompt_index for r in answer.results] == [0, 1]
            for result, ids in zip(answer.results, ((1, 2), (3, 5, 0)), strict=True):
                check_result(result, ids)

    run(main())


def check_result(result: inference_pb2.GenerateResult, ids: tuple[int, ...]) -> None:
    assert result.status.code == 0 and result.prompt_tokens == len(ids) and tuple(result.prompt_token_ids) == ids
    used = result.used
    assert (used.sampling.seed, used.sampling.temperature, used.sampling.n) == (5, 0.7, 2)
    assert used.stopping.max_new_tokens == 6 and not used.sampling.HasField("top_p")
    assert [p.logprob for p in result.prompt_logprobs] == [e.logprob for e in scores_of(ids)]
    for index, sample in enumerate(result.samples):
        tokens = tokens_of(ids, 5, index, 6)
        assert sample.index == index and list(sample.token_ids) == tokens
        assert sample.text == CODEC.tokenizer.decode([*ids, *tokens])
        assert list(sample.token_bytes) == [CODEC.tokenizer.token_bytes(t) for t in tokens]
        assert list(sample.logprobs) == [-t - 0.5 for t in tokens]
        assert [t.tokens[0].token_id for t in sample.top_logprobs] == tokens
        assert sample.finish_reason == inference_pb2.FINISH_REASON_LENGTH and sample.weight_version == 7
        assert sample.timings.total > 0


def test_what_was_not_asked_for_does_not_come() -> None:
    async def main() -> None:
        async with service() as s:
            (result,) = (await s.client.generate([[1]], stopping={"max_new_tokens": 3})).results
            (sample,) = result.samples
            assert not (sample.logprobs or sample.top_logprobs or sample.token_bytes or sample.HasField("timings"))
            assert not (result.prompt_logprobs or result.prompt_token_ids)
            assert result.used.sampling.HasField("seed"), "the seed drawn comes back: the answer can be asked for again"
            again = await s.client.generate(
                [[1]], sampling={"seed": result.used.sampling.seed}, stopping={"max_new_tokens": 3}
            )
            assert again.results[0].samples[0].token_ids == sample.token_ids

    run(main())


def test_a_stream_put_together_equals_the_unary_answer() -> None:
    async def main() -> None:
        async with service(FakeEngine(step_seconds=0.05)) as s:
            fields: dict[str, Any] = {
                "sampling": {"seed": 5, "n": 2},
                "stopping": {"max_new_tokens": 20, "stop_sequences": ["ba", "é"]},
                "response": {"logprobs": 1, "prompt_logprobs": 0, "token_bytes": True},
            }
            prompts = [[i, 2] for i in range(6)]
            whole = await s.client.generate(prompts, **fields)
            parts: dict[tuple[int, int], inference_pb2.Sample] = {}
            chunks = [chunk async for chunk in s.client.stream(prompts, **fields)]
            for chunk in chunks:
                sample = parts.setdefault(
                    (chunk.prompt_index, chunk.sample_index), inference_pb2.Sample(index=chunk.sample_index)
                )
                add_chunk(sample, chunk)
            for result in whole.results:
                assert list(result.samples) == [parts[result.prompt_index, i] for i in range(2)]
            heads = {chunk.prompt_index: chunk for chunk in reversed(chunks) if chunk.HasField("prompt")}
            assert {i: head.prompt.used for i, head in heads.items()} == {r.prompt_index: r.used for r in whole.results}
            assert len(chunks) > 12, "it was streamed, not sent at once"

    run(main())


def add_chunk(sample: inference_pb2.Sample, chunk: inference_pb2.GenerateChunk) -> None:
    sample.text += chunk.text
    sample.token_ids.extend(chunk.token_ids)
    sample.logprobs.extend(chunk.logprobs)
    sample.top_logprobs.extend(chunk.top_logprobs)
    sample.token_bytes.extend(chunk.token_bytes)
    sample.finish_reason = sample.finish_reason or chunk.finish_reason
    sample.stop_sequence += chunk.stop_sequence
    sample.weight_version = max(sample.weight_version, chunk.weight_version)
    if chunk.HasField("stop_token_id"):
        sample.stop_token_id = chunk.stop_token_id


def test_score_gives_one_log_probability_per_token_after_the_first() -> None:
    async def main() -> None:
        async with service() as s:
            answer = await s.client.score([[1, 2, 3], "ab a", [1]], temperature=0.5, top_logprobs=1)
            assert [list(r.token_ids) for r in answer.results] == [[1, 2, 3], [3, 5, 0], []]
            assert list(answer.results[0].logprobs) == [-0.25, -0.5]
            assert [t.tokens[0].token_id for t in answer.results[0].top_logprobs] == [2, 3]
            assert answer.results[2].status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert not (await s.client.score([[1, 2]])).results[0].top_logprobs

    run(main())


def test_tokenize_and_detokenize() -> None:
    async def main() -> None:
        async with service() as s:
            tokens = await s.client.tokenize(["ab a", "é日"])
            assert [list(t.ids) for t in tokens.results] == [[3, 5, 0], [10, 11, 12]]
            back = await s.client.detokenize([[3, 5, 0], [99], []])
            assert [(r.status.code, r.text) for r in back.results] == [(0, "ab a"), (3, ""), (0, "")]
            await refused(s.client.tokenize([]), grpc.StatusCode.INVALID_ARGUMENT, "texts")

    run(main())


def test_items_that_fail_have_their_own_status_and_a_call_of_only_such_items_fails() -> None:
    async def main() -> None:
        async with service(FakeEngine(error_on_prompt=(7,))) as s:
            answer = await s.client.generate([[1], [], [7], [2]], stopping={"max_new_tokens": 2})
            assert [r.status.code for r in answer.results] == [0, 3, 13, 0]
            assert [len(r.samples) for r in answer.results] == [1, 0, 0, 1]
            error = await refused(s.client.generate([[], [99]]), grpc.StatusCode.INVALID_ARGUMENT, "prompts[0]")
            assert violations(error) == ["prompts[0]"]
            seen = [chunk async for chunk in s.client.stream([[1], [99], [7]], stopping={"max_new_tokens": 2})]
            assert {c.prompt_index: c.status.code for c in seen if c.HasField("status")} == {1: 3, 2: 13}
            with pytest.raises(ServiceError, match="INTERNAL: told to fail"):
                [chunk async for chunk in s.client.stream([[7]])]

    run(main())


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"sampling": {"temperature": math.nan}}, "INVALID_ARGUMENT", "sampling.temperature"),
        ({"sampling": {"beam": {"width": 4, "groups": 3}}}, "INVALID_ARGUMENT", "sampling.beam.groups"),
        ({"sampling": {"beam": {"width": 2}, "n": 3}}, "INVALID_ARGUMENT", "sampling.n"),
        (
            {"sampling": {"beam": {"width": 2}}, "stopping": {"stop_sequences": ["a"]}},
            "INVALID_ARGUMENT",
            "stop_token_ids",
        ),
        ({"sampling": {"n": 3, "best_of": 2}}, "INVALID_ARGUMENT", "sampling.best_of"),
        ({"adapter": "lora"}, "UNIMPLEMENTED", "adapter"),
        ({"prompts": [{"fim": {"prefix": "a", "suffix": "b"}}]}, "INVALID_ARGUMENT", "prompts[0].fim"),
        ({"prompts": [{}]}, "INVALID_ARGUMENT", "prompts[0]"),
        ({"prompts": [{"text": "a" * 100_000}]}, "RESOURCE_EXHAUSTED", "100000 characters"),
        ({"prompts": [{"token_ids": {"ids": [1] * 500}}]}, "RESOURCE_EXHAUSTED", "500 tokens are too long"),
        ({"prompts": [{"token_ids": {"ids": [4294967295]}}]}, "INVALID_ARGUMENT", "4294967295"),
        ({"sampling": {"allowed_token_ids": [1] * 70_000}}, "INVALID_ARGUMENT", "70000 entries"),
    ],
    ids=range(12),
)
def test_an_error_names_its_field_in_text_and_details(fields: dict[str, Any], code: str, words: str) -> None:
    async def main() -> None:
        async with service() as s:
            message = inference_pb2.GenerateRequest(**{"prompts": [{"token_ids": {"ids": [1]}}], **fields})
            error = await refused(s.client.call(s.client.inference.Generate, message), grpc.StatusCode[code], words)
            assert violations(error), "the field is in the details too"

    run(main())


def test_a_checkpoint_without_a_tokenizer_serves_ids_and_says_so_about_text() -> None:
    async def main() -> None:
        async with service(codec=None) as s:
            (result,) = (
                await s.client.generate([[1]], stopping={"max_new_tokens": 4}, response={"echo": True})
            ).results
            assert len(result.samples[0].token_ids) == 4 and result.samples[0].text == ""
            for wrong in (s.client.generate(["a"]), s.client.tokenize(["a"])):
                error = await refused(wrong, grpc.StatusCode.FAILED_PRECONDITION, "no tokenizer")
                assert info(error).reason == "NO_TOKENIZER"
            assert not (await s.client.model_info()).supports_text_input

    run(main())


def test_a_prompt_with_a_hole_is_marked_with_the_models_own_tokens() -> None:
    async def main() -> None:
        async with service(codec=replace(CODEC, fim=FimTokens(prefix=7, suffix=8, middle=9))) as s:
            message = inference_pb2.GenerateRequest(
                prompts=[
                    {"fim": {"prefix": "ab", "suffix": "c"}},
                    {"fim": {"prefix": "ab", "suffix": "c", "order": "FIM_SUFFIX_FIRST"}},
                ],
                stopping={"max_new_tokens": 3},
                response={"echo": True},
            )
            answer = await s.client.call(s.client.inference.Generate, message)
            assert list(answer.results[0].prompt_token_ids) == [7, 3, 8, 2, 9]
            assert list(answer.results[1].prompt_token_ids) == [7, 8, 2, 9, 3], "the answer goes on after the prefix"

    run(main())


def violations(error: ServiceError) -> list[str]:
    return [v.field for detail in error.details if isinstance(detail, BadRequest) for v in detail.field_violations]
