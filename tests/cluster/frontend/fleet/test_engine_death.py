"""Death of the engine: the journal feeds a new one, and no reader loses or doubles a token."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from dataclasses import replace

import pytest

from cluster.engine.request import FinishReason, ResponseOptions, SamplingParams, StoppingCriteria, TokenEvent
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.output.streams import Result
from cluster.frontend.requests.call import Call, FrontendConfig
from cluster.link.local_link import LocalLink
from cluster.request_errors import EngineFault
from tests.cluster.frontend.fakes import CODEC, FakeEngine, scores_of, tokens_of
from tests.cluster.frontend.harness import PlayedLink, answer, call, deaths_of_their_own, run, until
from tests.cluster.link.engine_process import engine_process

RECOVERING = FrontendConfig(recovery_seconds=20.0)


def random_call(rng: random.Random) -> Call:
    prompt = [rng.randrange(13) for _ in range(rng.randint(2, 5))]
    stops = rng.choice([(), (), ("b",), ("a a", "cé")])
    return call(
        prompt,
        sampling=SamplingParams(seed=rng.randrange(99), n=rng.randint(1, 3)),
        stopping=StoppingCriteria(max_new_tokens=rng.randint(1, 30), stop_sequences=stops),
        response=ResponseOptions(logprobs=rng.choice([None, 1]), prompt_logprobs=rng.choice([None, 0])),
    )


def essence(results: list[Result]) -> list[object]:
    """All that must not depend on what the engine lived through."""
    return [
        (i, s.text, s.token_ids, s.logprobs, s.finish_reason, s.stop_sequence, r.prompt_logprobs)
        for r in results
        for i, s in sorted(r.samples.items())
    ]


def test_answers_over_engines_that_die_again_and_again_equal_those_of_one_that_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deaths_of_their_own(monkeypatch)

    async def main() -> None:
        rng = random.Random(5)
        calls = [random_call(rng) for _ in range(60)]
        quiet = Frontend(LocalLink(FakeEngine()), codec=CODEC)
        quiet.start()
        expected = [essence(await answer(quiet, asked)) for asked in calls]
        await quiet.close()

        engine = FakeEngine(crash_at_step=3)
        frontend = Frontend(LocalLink(engine), codec=CODEC, config=RECOVERING)
        frontend.start()
        tasks = [asyncio.create_task(answer(frontend, asked)) for asked in calls]
        deaths = 0
        while not all(task.done() for task in tasks):
            if frontend.state is State.RECOVERING:
                deaths += 1
                engine = FakeEngine(crash_at_step=rng.randint(1, 4) if deaths < 12 else None)
                await frontend.reattach(LocalLink(engine))
            await asyncio.sleep(0.001)
        assert deaths == 12
        assert [essence(task.result()) for task in tasks] == expected
        assert engine.idle and frontend.num_open == 0
        await frontend.close()

    run(main())


def test_a_new_engine_is_asked_to_go_on_exactly_after_what_was_received() -> None:
    async def main() -> None:
        old, new = PlayedLink(), PlayedLink()
        frontend = Frontend(old, codec=CODEC, config=RECOVERING)
        frontend.start()
        asked = call(
            [1, 2],
            sampling=SamplingParams(seed=9, n=3),
            stopping=StoppingCriteria(max_new_tokens=4),
            response=ResponseOptions(prompt_logprobs=0),
            deadline=3600.0,
        )
        stream = await frontend.open(asked)
        key = old.submitted[0].request_id
        old.events([TokenEvent(request_id=key, token_ids=(4, 5), prompt_logprobs=scores_of((1, 2)))])
        old.events([TokenEvent(request_id=key, sample_index=1, token_ids=(6,), finish_reason=FinishReason.STOP)])
        old.events([TokenEvent(request_id=key, sample_index=2, token_ids=(6, 6, 6, 6))])
        old.fault("rank 0 on here: gone")
        await until(lambda: frontend.state is State.RECOVERING)
        await frontend.reattach(new)
        (resumed,) = new.submitted
        assert resumed.resumed_ids == ((4, 5), (6,), (6, 6, 6, 6))
        assert resumed.finished_samples == (1, 2), "sample 2 had all its tokens and only missed its end"
        assert resumed.response.prompt_logprobs is None, "they were received and must not come twice"
        assert resumed.sampling.seed == 9 and resumed.deadline is not None and 3000.0 < resumed.deadline < 3600.0
        old.events([TokenEvent(request_id=key, token_ids=(9,))])
        new.events([TokenEvent(request_id=key, token_ids=(7, 8), finish_reason=FinishReason.LENGTH)])
        got: dict[int, list[int]] = {}
        async for chunk in stream:
            got.setdefault(chunk.sample_index, []).extend(chunk.token_ids)
        assert got == {0: [4, 5, 7, 8], 1: [6], 2: [6, 6, 6, 6]}, "the dead engine's late token does not count"
        assert old.closed and not new.closed

    run(main())


def test_requests_admitted_during_the_pause_run_on_the_new_engine() -> None:
    async def main() -> None:
        frontend = Frontend(LocalLink(FakeEngine(crash_at_step=1)), codec=CODEC, config=RECOVERING)
        frontend.start()
        first = asyncio.create_task(answer(frontend, call([1])))
        await until(lambda: frontend.state is State.RECOVERING)
        second = asyncio.create_task(answer(frontend, call([2])))
        third = await frontend.open(call([3]))
        third.close()
        await frontend.reattach(LocalLink(FakeEngine()))
        assert (await first)[0].samples[0].token_ids == tokens_of([1], 1, 0, 8)
        assert (await second)[0].samples[0].token_ids == tokens_of([2], 1, 0, 8)
        assert frontend.state is State.SERVING
        await frontend.close()

    run(main())


def test_where_no_new_engine_comes_in_time_everything_open_fails_with_the_cause() -> None:
    async def main() -> None:
        config = replace(RECOVERING, recovery_seconds=0.1)
        frontend = Frontend(LocalLink(FakeEngine(crash_at_step=2)), codec=CODEC, config=config)
        frontend.start()
        with pytest.raises(EngineFault, match="told to fail"):
            await answer(frontend, call([1]))
        assert frontend.state.value == "failed"
        await frontend.reattach(LocalLink(FakeEngine()))
        assert frontend.state.value == "serving" and len(await answer(frontend, call([1]))) == 1
        await frontend.close()

    run(main())


def test_kill_9_of_the_engines_process_mid_stream_is_noticed_at_once_and_replayed_whole() -> None:
    async def main() -> None:
        with engine_process(step_seconds=0.01) as first, engine_process() as second:
            frontend = Frontend(first.link(), codec=CODEC, config=RECOVERING)
            frontend.start()
            stopping = StoppingCriteria(max_new_tokens=100)
            calls = [call([i], sampling=SamplingParams(seed=i, n=2), stopping=stopping) for i in range(10)]
            began = time.monotonic()
            tasks = [asyncio.create_task(answer(frontend, asked)) for asked in calls]
            await until(lambda: frontend.meters.first_token.count >= 2 * len(calls))
            first.signal(signal.SIGKILL)
            struck_after = time.monotonic() - began
            await until(lambda: frontend.state is State.RECOVERING)
            assert "rank 0 on" in frontend.fault_cause and "has ended" in frontend.fault_cause
            await frontend.reattach(await asyncio.to_thread(second.link))
            for i, task in enumerate(tasks):
                (result,) = await task
                assert {k: s.token_ids for k, s in result.samples.items()} == {
                    k: tokens_of([i], i, k, 100) for k in (0, 1)
                }
                first_part = result.samples[0].timings
                assert first_part is not None and first_part.first_token < struck_after, "on the first engine"
            await frontend.close()

    run(main())
