"""Several engines behind one front-end: what is open moves on when one is lost, and nothing late is heard."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from cluster.engine.request import EngineLoad, FinishReason, ModelLimits, SamplingParams, StoppingCriteria, TokenEvent
from cluster.frontend.fleet.engine_stats import total
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.readiness import Readiness
from cluster.frontend.requests.call import FrontendConfig
from cluster.link.local_link import LocalLink
from cluster.request_errors import EngineFault
from parallel.errors import WorkerError
from tests.cluster.frontend.fakes import CODEC, FakeEngine, tokens_of
from tests.cluster.frontend.harness import PlayedLink, answer, call, deaths_of_their_own, run, until

CONFIG = FrontendConfig(recovery_seconds=60.0)


def played(count: int = 2) -> tuple[Frontend, list[PlayedLink]]:
    links = [PlayedLink() for _ in range(count)]
    frontend = Frontend(links, codec=CODEC, config=CONFIG)
    frontend.start()
    return frontend, links


def proven(frontend: Frontend) -> None:
    for replica in frontend.fleet.replicas:
        if replica.seat:
            frontend.fleet.judge(replica.seat, "")


def limited(most: int = 8) -> StoppingCriteria:
    return StoppingCriteria(max_new_tokens=most)


def test_requests_are_spread_by_what_is_outstanding_and_ends_are_counted() -> None:
    async def main() -> None:
        frontend, links = played()
        big = await frontend.open(call([1, 2], stopping=limited(200)))
        for prompt in ([3], [4], [5]):
            await frontend.open(call(prompt, stopping=limited(10)))
        assert [len(link.submitted) for link in links] == [1, 3]
        assert [replica.seat.tokens for replica in frontend.fleet.replicas if replica.seat] == [202, 33]
        big.close()
        assert links[0].aborted == [links[0].submitted[0].request_id] and links[1].aborted == []
        await frontend.open(call([6]))
        assert [len(link.submitted) for link in links] == [2, 3]
        await frontend.close()
        assert all(link.closed for link in links)

    run(main())


def test_a_lost_replicas_requests_go_on_with_the_other_at_once_and_its_late_events_are_not_heard() -> None:
    async def main() -> None:
        frontend, (old, other) = played()
        states: list[State] = []
        frontend.observe(states.append)
        stream = await frontend.open(call([1, 2], sampling=SamplingParams(seed=9, n=2), stopping=limited(4)))
        key = old.submitted[0].request_id
        old.events([TokenEvent(request_id=key, token_ids=(4, 5))])
        old.events([TokenEvent(request_id=key, sample_index=1, token_ids=(6,), finish_reason=FinishReason.STOP)])
        old.fault("rank 0 on a: its process died")
        await until(lambda: bool(other.submitted))
        (resumed,) = other.submitted
        assert (resumed.resumed_ids, resumed.finished_samples) == (((4, 5), (6,)), (1,))
        old.events([TokenEvent(request_id=key, token_ids=(9, 9))])
        old.fault("and again")
        await asyncio.sleep(0.01)
        other.events([TokenEvent(request_id=key, token_ids=(7, 8), finish_reason=FinishReason.LENGTH)])
        got: dict[int, list[int]] = {}
        async for chunk in stream:
            got.setdefault(chunk.sample_index, []).extend(chunk.token_ids)
        assert got == {0: [4, 5, 7, 8], 1: [6]}
        assert states == [State.SERVING], "one replica serves"
        assert frontend.fault_cause == "replica 0: rank 0 on a: its process died"
        await frontend.close()

    run(main())


def test_an_engine_that_goes_on_after_its_requests_were_handed_over_is_not_heard_either() -> None:
    async def main() -> None:
        frontend, (old, other) = played()
        stream = await frontend.open(call([1], stopping=limited(2)))
        key = old.submitted[0].request_id
        frontend.release("it is restarted")
        assert other.submitted[0].request_id == key
        old.events([TokenEvent(request_id=key, token_ids=(3, 3), finish_reason=FinishReason.LENGTH)])
        await asyncio.sleep(0.01)
        other.events([TokenEvent(request_id=key, token_ids=(1, 2), finish_reason=FinishReason.LENGTH)])
        assert [token async for chunk in stream for token in chunk.token_ids] == [1, 2]
        await frontend.close()

    run(main())


def test_without_any_engine_requests_wait_and_the_first_one_back_takes_them_all() -> None:
    async def main() -> None:
        frontend, links = played()
        streams = [await frontend.open(call([prompt])) for prompt in range(4)]
        assert [len(link.submitted) for link in links] == [2, 2]
        states: list[State] = []
        frontend.observe(states.append)
        frontend.fault("gone", 0)
        assert states == [State.SERVING] and len(links[1].submitted) == 4
        frontend.fault("gone as well", 1)
        assert states == [State.SERVING, State.RECOVERING]
        streams.append(await frontend.open(call([5])))
        back = PlayedLink()
        await frontend.reattach(back, 1)
        assert states[2:] == [State.SERVING] and len(back.submitted) == 5 and links[1].closed
        assert frontend.fault_cause == "replica 0: gone" and frontend.restarts == 1
        await frontend.reattach(PlayedLink(), 0)
        assert frontend.fault_cause == "" and [replica.restarts for replica in frontend.fleet.replicas] == [1, 1]
        await frontend.close()

    run(main())


def test_answers_over_replicas_that_die_in_turn_equal_those_of_one_that_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deaths_of_their_own(monkeypatch)

    async def main() -> None:
        rng = random.Random(7)
        engines = [FakeEngine(crash_at_step=4), FakeEngine(crash_at_step=6)]
        frontend = Frontend([LocalLink(engine) for engine in engines], codec=CODEC, config=CONFIG)
        frontend.start()
        asked = [call([i, i + 1], sampling=SamplingParams(seed=i, n=2), stopping=limited(40)) for i in range(12)]
        tasks = [asyncio.create_task(answer(frontend, each)) for each in asked]
        deaths = 0
        while not all(task.done() for task in tasks):
            for replica in frontend.fleet.replicas:
                if replica.seat is None:
                    deaths += 1
                    engine = FakeEngine(crash_at_step=rng.randint(3, 7) if deaths < 20 else None)
                    await frontend.reattach(LocalLink(engine), replica.index)
            await asyncio.sleep(0.001)
        for i, task in enumerate(tasks):
            (result,) = task.result()
            assert {k: s.token_ids for k, s in result.samples.items()} == {
                k: tokens_of([i, i + 1], i, k, 40) for k in (0, 1)
            }
        assert deaths >= 2 and frontend.num_open == 0
        assert not any(replica.seat.tokens for replica in frontend.fleet.replicas if replica.seat)
        await frontend.close()

    run(main(), 120.0)


def test_a_held_or_doubted_replica_gets_nothing_new_while_another_will_do() -> None:
    async def main() -> None:
        frontend, links = played()
        proven(frontend)
        fleet = frontend.fleet
        fleet.hold(0, True)
        for prompt in range(3):
            await frontend.open(call([prompt]))
        assert [len(link.submitted) for link in links] == [0, 3]
        fleet.hold(0, False)
        seat = fleet.replicas[1].seat
        assert seat is not None
        fleet.judge(seat, "it computes nonsense")
        for prompt in range(4):
            await frontend.open(call([prompt], stopping=limited(100)))
        assert [len(link.submitted) for link in links] == [4, 3]
        frontend.fault("gone", 0)
        assert len(links[1].submitted) == 7, "better than none"
        await frontend.close()

    run(main())


def test_one_replica_in_doubt_leaves_the_server_ready_and_all_of_them_do_not() -> None:
    async def main() -> None:
        engines = [FakeEngine(), FakeEngine()]
        frontend = Frontend([LocalLink(engine) for engine in engines], codec=CODEC, config=CONFIG)
        readiness = Readiness(frontend)
        frontend.start()
        assert not readiness.ready and readiness.reason.count("no canary") == 2
        assert await readiness.prove() and [engine.canaries for engine in engines] == [1, 1]
        engines[0].canary_fault = "nonsense"
        assert await readiness.prove() and readiness.failures == 1
        frontend.fault("gone", 1)
        assert not readiness.ready and readiness.reason == "replica 0: nonsense; replica 1: gone"
        await frontend.reattach(LocalLink(FakeEngine()), 1)
        assert not readiness.ready, "the new one has proved nothing yet"
        assert await readiness.prove() and readiness.reason == ""
        await frontend.close()

    run(main())


def test_a_request_must_fit_every_replica() -> None:
    async def main() -> None:
        small = ModelLimits(vocab_size=13, max_context=256, kv_capacity_tokens=64, max_batch=0)
        frontend = Frontend([PlayedLink(), PlayedLink(small)], codec=CODEC, config=CONFIG)
        frontend.start()
        assert frontend.limits.kv_capacity_tokens == 64
        roomy = frontend.fleet.replicas[0].link
        await frontend.open(call([1] * 60, stopping=limited(100)))
        assert isinstance(roomy, PlayedLink) and roomy.submitted[0].stopping.max_new_tokens == 5
        await frontend.close()

    run(main())


def test_loads_are_added_up_and_one_that_answers_is_enough() -> None:
    async def main() -> None:
        frontend, links = played()
        links[0].answer = EngineLoad(steps=2, weight_version=3, canary_fault="x", collectives={"a": (1, 10)})
        links[1].answer = EngineLoad(steps=5, weight_version=1, collectives={"a": (2, 5), "b": (1, 1)})
        load = await frontend.load()
        assert (load.steps, load.weight_version, load.canary_fault) == (7, 3, "x")
        assert load.collectives == {"a": (3, 15), "b": (1, 1)}
        assert total([WorkerError("late"), links[1].answer]).steps == 5
        with pytest.raises(WorkerError, match="late"):
            total([WorkerError("late")])
        frontend.fail("nothing is left")
        assert frontend.state is State.FAILED
        with pytest.raises(EngineFault, match="nothing is left"):
            await frontend.load()
        await frontend.close()

    run(main())


def test_an_abort_reaches_the_replicas_that_work_on_it_and_no_other() -> None:
    async def main() -> None:
        frontend, links = played(3)
        names: dict[str, Any] = {"request_id": "both"}
        await frontend.open(call([1], [2], **names))
        await frontend.open(call([3], request_id="third"))
        assert frontend.abort(["both"]) == 2
        assert [len(link.aborted) for link in links] == [1, 1, 0]
        await frontend.close()

    run(main())
