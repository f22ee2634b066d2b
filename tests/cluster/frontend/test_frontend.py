"""The life of calls in a front-end over a fake engine in its own thread."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.engine.request import FinishReason, ResponseOptions, SamplingParams, Share, StoppingCriteria, TokenEvent
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.output.streams import Chunk
from cluster.link.engine_link import Rejected
from cluster.request_errors import DuplicateRequest, InvalidRequest, RequestFailed
from parallel.errors import CapacityError, QueueFull
from tests.cluster.frontend.fakes import CODEC, ENDLESS, LASTING, PIECES, FakeEngine, scores_of, tokens_of
from tests.cluster.frontend.harness import PlayedLink, answer, call, run, serving, until
from tests.cluster.frontend.output.test_stop_strings import brute_force


def test_every_sample_of_every_prompt_arrives_whole_with_text_and_parameters() -> None:
    async def main() -> None:
        async with serving(FakeEngine()) as frontend:
            results = await answer(frontend, call([1, 2], "ab a", sampling=SamplingParams(seed=3, n=3)))
            for result, ids in zip(results, ((1, 2), (3, 5, 0)), strict=True):
                assert result.error is None and result.prompt is not None
                assert (result.prompt.num_tokens, result.prompt.sampling.seed) == (len(ids), 3)
                for index, sample in result.samples.items():
                    assert sample.token_ids == tokens_of(ids, 3, index, 8)
                    assert sample.text == CODEC.tokenizer.decode(sample.token_ids)
                    assert (sample.finish_reason, sample.weight_version) == (FinishReason.LENGTH, 7)
                    assert sample.timings is not None and sample.timings.total >= sample.timings.first_token > 0
            assert frontend.num_open == 0

    run(main())


def test_chunks_put_together_are_the_whole_answer() -> None:
    async def main() -> None:
        async with serving(FakeEngine(step_seconds=0.05)) as frontend:
            asked = call([1], [2], sampling=SamplingParams(seed=3, n=2), response=ResponseOptions(logprobs=1))
            whole = await answer(frontend, asked)
            parts: dict[tuple[int, int], list[Chunk]] = {}
            async with await frontend.open(asked) as stream:
                async for chunk in stream:
                    parts.setdefault((chunk.prompt_index, chunk.sample_index), []).append(chunk)
            for (prompt, sample), chunks in parts.items():
                unary = whole[prompt].samples[sample]
                assert "".join(c.text for c in chunks) == unary.text
                assert [t for c in chunks for t in c.token_ids] == unary.token_ids
                assert [p for c in chunks for p in c.logprobs] == unary.logprobs and len(unary.logprobs) == 8
                assert [c.finish_reason for c in chunks if c.finish_reason] == [FinishReason.LENGTH]
            assert len(parts) == 4 and sum(map(len, parts.values())) > 4, "it was streamed, not sent at once"

    run(main())


def test_stop_strings_end_samples_as_brute_force_says_and_the_engine_frees_them() -> None:
    async def main() -> None:
        engine = FakeEngine(tokens_per_step=3)
        async with serving(engine) as frontend:
            for seed in range(150):
                stops = (("b", "ab"), ("a a", "xyz"), ("é",), ("日b", "c日"))[seed % 4]
                asked = call(
                    [seed % 13],
                    sampling=SamplingParams(seed=seed, n=3),
                    stopping=StoppingCriteria(
                        max_new_tokens=24, stop_sequences=stops, include_stop_sequence=seed % 3 == 0
                    ),
                    response=ResponseOptions(logprobs=0),
                )
                (result,) = await answer(frontend, asked)
                for index, sample in result.samples.items():
                    check_stopped(sample, tokens_of([seed % 13], seed, index, 24), list(stops), seed % 3 == 0)
            await until(lambda: engine.idle)

    run(main())


def check_stopped(sample: Chunk, ids: list[int], stops: list[str], include: bool) -> None:
    text, stop = brute_force(CODEC.tokenizer.decode(ids), stops, include)
    assert (sample.text, sample.stop_sequence) == (text, stop)
    assert [entry.token_id for entry in sample.logprobs] == sample.token_ids, "tokens after the stop have none"
    assert sample.finish_reason is (FinishReason.LENGTH if stop is None else FinishReason.STOP)
    if stop is None:
        assert sample.token_ids == ids
    else:
        count = len(sample.token_ids)
        assert sample.token_ids == ids[:count]
        assert stop in b"".join(PIECES[i] for i in ids[:count]).decode("utf-8", "ignore")
        assert stop not in b"".join(PIECES[i] for i in ids[: count - 1]).decode("utf-8", "ignore")


def test_a_stop_string_of_one_sample_leaves_the_others_running() -> None:
    async def main() -> None:
        link = PlayedLink()
        frontend = Frontend(link, codec=CODEC)
        frontend.start()
        asked = call([1], sampling=SamplingParams(seed=1, n=2), stopping=StoppingCriteria(stop_sequences=("b",)))
        stream = await frontend.open(asked)
        key = link.submitted[0].request_id
        link.events(
            [TokenEvent(request_id=key, token_ids=(1,)), TokenEvent(request_id=key, sample_index=1, token_ids=(0,))]
        )
        link.events(
            [TokenEvent(request_id=key, token_ids=(2,)), TokenEvent(request_id=key, sample_index=1, token_ids=(1,))]
        )
        chunks = [chunk async for chunk in stream]
        assert link.aborted_samples == [(key, 0)] and link.aborted == [key]
        assert {c.sample_index: (c.token_ids, c.text, c.stop_sequence) for c in chunks} == {
            0: ([1], "", "b"),
            1: ([0, 1], "a", "b"),
        }

    run(main())


def test_scores_come_back_one_per_token_after_the_first() -> None:
    async def main() -> None:
        async with serving(FakeEngine()) as frontend:
            asked = call([1, 2, 3], "ab a", [4], score=True, response=ResponseOptions(prompt_logprobs=1))
            results = await answer(frontend, asked)
            assert results[0].prompt_logprobs == scores_of((1, 2, 3))
            assert results[1].prompt_logprobs == scores_of((3, 5, 0))
            assert isinstance(results[2].error, InvalidRequest) and "sequences[2]" in str(results[2].error)

    run(main())


def test_prompts_that_fail_do_not_fail_the_others() -> None:
    async def main() -> None:
        async with serving(FakeEngine(error_on_prompt=(7,))) as frontend:
            results = await answer(frontend, call([1], [], [7], [99], [2]))
            kinds = [type(result.error) for result in results]
            assert kinds == [type(None), InvalidRequest, RequestFailed, InvalidRequest, type(None)]
            assert results[4].samples[0].token_ids == tokens_of([2], 1, 0, 8)
            with pytest.raises(InvalidRequest, match=r"prompts\[0\]"):
                await frontend.open(call([], [99]))
            with pytest.raises(RequestFailed, match="told to fail"):
                await answer(frontend, call([7]))

    run(main())


def test_a_request_that_the_engine_refuses_at_submission_does_not_end_the_engine() -> None:
    async def main() -> None:
        async with serving(FakeEngine(reject_prompt=(7,))) as frontend:
            results = await answer(frontend, call([7], [2]))
            assert isinstance(results[0].error, CapacityError) and str(results[0].error) == "told to reject"
            assert results[1].samples[0].token_ids == tokens_of([2], 1, 0, 8)
            with pytest.raises(CapacityError):
                await answer(frontend, call([7]))
            assert frontend.state is State.SERVING

    run(main())


def test_coalesced_chunks_carry_the_newest_weights_version_and_everything_that_came_once() -> None:
    async def main() -> None:
        link = PlayedLink()
        frontend = Frontend(link, codec=CODEC)
        frontend.start()
        stream = await frontend.open(call([1, 2]))
        key = link.submitted[0].request_id
        link.events([TokenEvent(request_id=key, token_ids=(1,), weight_version=3, prompt_logprobs=scores_of((1, 2)))])
        link.events([TokenEvent(request_id=key, token_ids=(2,), weight_version=4)])
        end = TokenEvent(request_id=key, finish_reason=FinishReason.STOP, stop_token_id=9, weight_version=4)
        link.events([end])
        await asyncio.sleep(0.01)
        (chunk,) = [chunk async for chunk in stream]
        assert (chunk.token_ids, chunk.text, chunk.weight_version, chunk.stop_token_id) == ([1, 2], "bc", 4, 9)
        assert chunk.prompt is not None and chunk.prompt_logprobs == scores_of((1, 2)) and chunk.timings is not None

    run(main())


def test_an_engine_that_rejects_gives_its_own_error_to_that_prompt() -> None:
    async def main() -> None:
        link = PlayedLink()
        frontend = Frontend(link, codec=CODEC)
        frontend.start()
        stream = await frontend.open(call([1], [2]))
        first, second = (request.request_id for request in link.submitted)
        link.events(
            [Rejected(first, CapacityError("no room")), TokenEvent(request_id=second, finish_reason=FinishReason.STOP)]
        )
        chunks = {chunk.prompt_index: chunk async for chunk in stream}
        assert isinstance(chunks[0].error, CapacityError) and chunks[1].finish_reason is FinishReason.STOP

    run(main())


def test_an_id_in_use_and_a_full_queue_are_refused_until_there_is_room() -> None:
    async def main() -> None:
        async with serving(FakeEngine(limits=ENDLESS, step_seconds=0.002), max_open_requests=3) as frontend:
            stopping = StoppingCriteria(max_new_tokens=LASTING)
            stream = await frontend.open(call([1], [2], request_id="x", stopping=stopping))
            with pytest.raises(DuplicateRequest, match="'x'"):
                await frontend.open(call([1], request_id="x"))
            with pytest.raises(CapacityError, match="4 samples were sent and at most 3") as never:
                await frontend.open(call([1], sampling=SamplingParams(n=4)))
            assert not isinstance(never.value, QueueFull)
            with pytest.raises(QueueFull, match="2 samples are open and 2 more"):
                await frontend.open(call([1], sampling=SamplingParams(n=2)))
            await answer(frontend, call([3]))
            stream.close()
            assert len(await answer(frontend, call([1], [2], request_id="x"))) == 2

    run(main())


def test_a_slow_reader_gets_fewer_larger_chunks_and_holds_up_nobody() -> None:
    async def main() -> None:
        engine = FakeEngine(step_seconds=0.001)
        async with serving(engine) as frontend:
            slow = await frontend.open(call([1], stopping=StoppingCriteria(max_new_tokens=100)))
            await answer(frontend, call([2], stopping=StoppingCriteria(max_new_tokens=100)))
            await until(lambda: not engine.live)
            chunks = [chunk async for chunk in slow]
            assert len(chunks) == 1 and chunks[0].token_ids == tokens_of([1], 1, 0, 100)

    run(main())


def test_echo_puts_the_prompt_first_once_per_sample() -> None:
    async def main() -> None:
        async with serving(FakeEngine()) as frontend:
            asked = call("ab a", sampling=SamplingParams(seed=1, n=2), response=ResponseOptions(echo=True))
            (result,) = await answer(frontend, asked)
            assert result.prompt is not None and result.prompt.token_ids == (3, 5, 0)
            for sample in result.samples.values():
                assert sample.text == "ab a" + CODEC.tokenizer.decode(sample.token_ids) and len(sample.token_ids) == 8

    run(main())


def test_an_idle_engine_is_kept_alive_without_steps() -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with serving(engine):
            await until(lambda: engine.kept_alive >= 1)
            assert engine.steps == 0

    run(main())


def test_one_caller_never_takes_the_last_quarter_of_the_open_requests() -> None:
    async def main() -> None:
        async with serving(FakeEngine(held=True), max_open_requests=64) as frontend:
            mine, other = Share("token 'mine'"), Share("token 'other'")
            await frontend.open(replace(call(*[[1]] * 40), share=mine))
            with pytest.raises(QueueFull, match="40 samples of this caller are open and 9 more were sent; one caller"):
                await frontend.open(replace(call(*[[1]] * 9), share=mine))
            stream = await frontend.open(replace(call(*[[1]] * 16), share=other))
            await frontend.open(replace(call(*[[1]] * 8), share=mine))
            stream.close()
            await frontend.open(replace(call(*[[1]] * 16), share=other))

    run(main())
