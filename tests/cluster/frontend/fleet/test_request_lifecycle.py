"""Every way a request or a front-end can end before its time: readers that leave, aborts, deadlines, drains, faults."""

from __future__ import annotations

import asyncio

import pytest

from cluster.engine.request import FinishReason, StoppingCriteria, TokenEvent
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.requests.call import FrontendConfig
from cluster.link.local_link import LocalLink
from cluster.request_errors import Draining, EngineFault, RequestFailed
from tests.cluster.frontend.fakes import CODEC, ENDLESS, LASTING, FakeEngine, tokens_of
from tests.cluster.frontend.harness import PlayedLink, answer, call, run, serving, until


def test_a_reader_that_leaves_frees_the_engine_within_a_step() -> None:
    async def main() -> None:
        engine = FakeEngine(limits=ENDLESS, step_seconds=0.005)
        async with serving(engine) as frontend:
            stopping = StoppingCriteria(max_new_tokens=LASTING)
            async with await frontend.open(call([1], [2], stopping=stopping)) as stream:
                await anext(stream)
                assert len(engine.live) == 2
            await until(lambda: not engine.live)
            assert frontend.num_open == 0

    run(main())


def test_abort_by_id_ends_the_stream_with_what_was_there() -> None:
    async def main() -> None:
        engine = FakeEngine(limits=ENDLESS, step_seconds=0.005)
        async with serving(engine) as frontend:
            stopping = StoppingCriteria(max_new_tokens=LASTING)
            stream = await frontend.open(call([1], [2], request_id="x", stopping=stopping))
            await anext(stream)
            assert frontend.abort(["x", "unknown"]) == 2 and frontend.abort(["x"]) == 0
            rest = [chunk async for chunk in stream]
            assert {chunk.finish_reason for chunk in rest} == {FinishReason.ABORTED}
            await until(lambda: not engine.live)

    run(main())


def test_a_deadline_ends_a_request_even_where_the_engine_does_not_answer() -> None:
    async def main() -> None:
        link = PlayedLink()
        frontend = Frontend(link, codec=CODEC)
        frontend.start()
        (result,) = await answer(frontend, call([1], deadline=0.1))
        assert result.samples[0].finish_reason is FinishReason.DEADLINE
        assert link.aborted == [link.submitted[0].request_id]

    run(main())


def test_an_id_used_again_never_sees_the_late_tokens_of_its_first_use() -> None:
    async def main() -> None:
        link = PlayedLink()
        frontend = Frontend(link, codec=CODEC)
        frontend.start()
        first = await frontend.open(call([1], request_id="x"))
        first.close()
        second = await frontend.open(call([1], request_id="x"))
        old, new = (request.request_id for request in link.submitted)
        link.events([TokenEvent(request_id=old, token_ids=(5, 5)), TokenEvent(request_id=new, token_ids=(1,))])
        first.close()
        assert (await anext(second)).token_ids == [1]
        assert frontend.num_open == 1, "closing the first stream again must not end the second"

    run(main())


def test_drain_admits_nothing_finishes_what_is_open_and_ends_the_rest_after_the_grace_time() -> None:
    async def main() -> None:
        async with serving(FakeEngine(limits=ENDLESS, step_seconds=0.002)) as frontend:
            short = asyncio.create_task(answer(frontend, call([1])))
            long = await frontend.open(call([2], stopping=StoppingCriteria(max_new_tokens=LASTING)))
            await until(lambda: frontend.num_open == 2)
            draining = asyncio.create_task(frontend.drain(3.0))
            await asyncio.sleep(0)
            assert frontend.state is State.DRAINING
            with pytest.raises(Draining):
                await frontend.open(call([1]))
            (result,) = await short
            assert result.samples[0].finish_reason is FinishReason.LENGTH
            assert await draining == 1 and frontend.drained.is_set()
            chunks = [chunk async for chunk in long]
            assert chunks[-1].finish_reason is FinishReason.ABORTED

    run(main())


def test_drain_while_the_engine_is_gone_admits_nothing_and_still_finishes_on_a_new_one() -> None:
    async def main() -> None:
        frontend = Frontend(
            LocalLink(FakeEngine(crash_at_step=2)), codec=CODEC, config=FrontendConfig(recovery_seconds=9)
        )
        frontend.start()
        running = asyncio.create_task(answer(frontend, call([1])))
        await until(lambda: frontend.state is State.RECOVERING)
        draining = asyncio.create_task(frontend.drain(10.0))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await frontend.open(call([2]))
        await frontend.reattach(LocalLink(FakeEngine()))
        assert (await running)[0].samples[0].token_ids == tokens_of([1], 1, 0, 8)
        assert await draining == 0 and frontend.state is State.DRAINING
        await frontend.close()

    run(main())


def test_drain_of_an_idle_server_is_immediate() -> None:
    async def main() -> None:
        async with serving(FakeEngine()) as frontend:
            await answer(frontend, call([1]))
            async with asyncio.timeout(60):
                assert await frontend.drain(3600.0) == 0

    run(main())


def test_an_engine_that_fails_fails_its_requests_with_rank_node_and_cause() -> None:
    async def main() -> None:
        async with serving(FakeEngine(crash_at_step=3)) as frontend:
            with pytest.raises(EngineFault, match=r"rank 0 on \S+: RuntimeError: the fake engine was told to fail"):
                await answer(frontend, call([1]))
            assert frontend.state is State.FAILED
            with pytest.raises(EngineFault):
                await frontend.open(call([1]))
            with pytest.raises(EngineFault):
                await frontend.load()

    run(main())


def test_a_tokenizer_that_fails_on_one_request_ends_that_one_only() -> None:
    async def main() -> None:
        link = PlayedLink()
        frontend = Frontend(link, codec=CODEC)
        frontend.start()
        stream = await frontend.open(call([1], [2]))
        first, second = (request.request_id for request in link.submitted)
        link.events([TokenEvent(request_id=first, token_ids=(10_000,)), TokenEvent(request_id=second, token_ids=(1,))])
        link.events([TokenEvent(request_id=second, token_ids=(2,), finish_reason=FinishReason.STOP)])
        chunks = [chunk async for chunk in stream]
        assert isinstance(stream.errors[0], RequestFailed) and link.aborted == [first]
        assert [token for chunk in chunks if chunk.prompt_index == 1 for token in chunk.token_ids] == [1, 2]

    run(main())
