"""Restarts one replica after the other, over real links to fake engines and groups that play what they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from cluster.actors.programs.serve_program import ServeProgram
from cluster.engine.request import FinishReason, StoppingCriteria
from cluster.frontend.fleet.fleet import Restarted
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.readiness import Readiness
from cluster.frontend.requests.call import FrontendConfig
from cluster.request_errors import Draining, RestartRefused
from cluster.training.train_calls import Kind, TrainAnswer, TrainCall
from launch.serving import healing
from launch.serving.healing import RESTARTED, Healer
from launch.serving.rolling_restart import ReplicaHealers
from parallel.errors import WorkerError
from tests.cluster.frontend.fakes import CODEC, FakeEngine, tokens_of
from tests.cluster.frontend.harness import answer, call, run, until
from tests.cluster.link.test_socket_link import KEY, ServedEngine
from tests.launch.serving.test_healing_decisions import PlayedGroup, ready_of

LONG_S = 60.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(healing, "MOST_DELAY_S", 0.02)
    monkeypatch.setattr(healing, "CAUSE_S", 0.05)


class Played:
    """A server of as many replicas as groups; each group's first engine serves, the others come with rebuilds."""

    def __init__(self, groups: list[PlayedGroup], **config: Any) -> None:
        self.groups = groups
        self.config = FrontendConfig(recovery_seconds=LONG_S, **config)

    async def __aenter__(self) -> Played:
        first = [group.engines.pop(0) for group in self.groups]
        links = [await asyncio.to_thread(engine.link) for engine in first]
        self.frontend = Frontend(links, codec=CODEC, config=self.config)
        spec, kinds = ServeProgram(model="m", authkey=KEY), enumerate(zip(self.groups, first, strict=True))
        healers = [Healer(group, self.frontend, spec, ready_of(engine), i) for i, (group, engine) in kinds]  # type: ignore[arg-type]
        self.upkeep = ReplicaHealers(self.frontend, healers)
        self.readiness = Readiness(self.frontend, every_s=0.05)
        self.frontend.start()
        self.states: list[State] = []
        self.frontend.observe(self.states.append)
        assert await self.readiness.prove()
        self.tasks = [asyncio.create_task(self.upkeep.run()), asyncio.create_task(self.readiness.run())]
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self.tasks:
            task.cancel()
        await self.frontend.close()

    @property
    def open(self) -> list[int]:
        return [len(replica.seat.open) if replica.seat else -1 for replica in self.frontend.fleet.replicas]


def with_engines(count: int, main: Callable[..., Any], step_seconds: float = 0.02) -> None:
    with ExitStack() as stack:
        engines = [FakeEngine(step_seconds=step_seconds) for _ in range(count)]
        run(main(*(stack.enter_context(ServedEngine(engine)) for engine in engines)), 120)


def asked(frontend: Frontend, prompt: int, most: int) -> asyncio.Task[Any]:
    return asyncio.create_task(answer(frontend, call([prompt], stopping=StoppingCriteria(max_new_tokens=most))))


def test_one_after_the_other_with_what_does_not_end_in_time_handed_over() -> None:
    async def main(*engines: ServedEngine) -> None:
        groups = [PlayedGroup([engines[0], engines[2]]), PlayedGroup([engines[1], engines[3]])]
        async with Played(groups) as server:
            calls = [asked(server.frontend, prompt, 200) for prompt in range(4)]
            await until(lambda: server.open == [2, 2])
            done = await server.upkeep.restart(0.1)
            assert done.replicas == 2 and done.handed_over >= 2
            for prompt, task in enumerate(calls):
                (result,) = await task
                assert result.samples[0].token_ids == tokens_of([prompt], 1, 0, 200)
            assert [group.kept for group in groups] == [[False], [False]]
            assert server.states == [State.SERVING]
            assert [replica.restarts for replica in server.frontend.fleet.replicas] == [1, 1]
            assert all(not replica.held and not replica.doubt for replica in server.frontend.fleet.replicas)
            assert engines[2].engine.canaries >= 1 and engines[3].engine.canaries >= 1

    with_engines(4, main)


def test_what_ends_within_the_grace_time_is_not_moved_and_nothing_new_comes_there_meanwhile() -> None:
    async def main(*engines: ServedEngine) -> None:
        groups = [PlayedGroup([engines[0], engines[2]]), PlayedGroup([engines[1], engines[3]])]
        async with Played(groups) as server:
            first = asked(server.frontend, 0, 60)
            await until(lambda: server.open == [1, 0])
            restarting = asyncio.create_task(server.upkeep.restart(LONG_S))
            await until(lambda: server.frontend.fleet.replicas[0].held)
            others = [asked(server.frontend, prompt, 10) for prompt in range(1, 4)]
            await asyncio.gather(first, *others)
            assert await restarting == Restarted(2, 0)
            assert engines[0].engine.submitted == 1 and engines[1].engine.submitted >= 3

    with_engines(4, main)


def test_a_single_replicas_restart_is_a_pause() -> None:
    async def main(first: ServedEngine, second: ServedEngine) -> None:
        async with Played([PlayedGroup([first, second])]) as server:
            task = asked(server.frontend, 5, 150)
            await until(lambda: first.engine.steps > 5)
            assert await server.upkeep.restart(LONG_S) == Restarted(1, 1), "there is nobody to wait for"
            assert (await task)[0].samples[0].token_ids == tokens_of([5], 1, 0, 150)
            assert server.states == [State.SERVING, State.RECOVERING, State.SERVING]

    with_engines(2, main)


def test_a_second_restart_and_one_while_the_server_stops_are_refused() -> None:
    async def main(*engines: ServedEngine) -> None:
        groups = [PlayedGroup([engines[0]]), PlayedGroup([engines[1]])]
        async with Played(groups) as server:
            task = asked(server.frontend, 0, 200)
            await until(lambda: server.open == [1, 0])
            restarting = asyncio.create_task(server.upkeep.restart(LONG_S))
            await until(lambda: server.frontend.fleet.replicas[0].held)
            with pytest.raises(RestartRefused, match="a restart is under way"):
                await server.upkeep.restart(1.0)
            draining = asyncio.create_task(server.frontend.drain(LONG_S))
            with pytest.raises(Draining, match="not restarted yet stays as it is"):
                await restarting
            assert not server.frontend.fleet.replicas[0].held
            assert await draining == 0
            assert (await task)[0].samples[0].finish_reason is FinishReason.LENGTH
            with pytest.raises(Draining):
                await server.upkeep.restart(1.0)
            assert [group.kept for group in groups] == [[], []]

    with_engines(2, main)


def test_the_next_one_waits_until_a_lost_one_is_back() -> None:
    async def main(*engines: ServedEngine) -> None:
        lost = PlayedGroup([engines[1]], failures=10**6, max_restarts=10**6)
        groups = [PlayedGroup([engines[0], engines[2]]), lost]
        async with Played(groups) as server:
            lost.fail()
            server.frontend.fault("its process died", 1)
            restarting = asyncio.create_task(server.upkeep.restart(0.0))
            task = asked(server.frontend, 3, 30)
            assert (await task)[0].samples[0].token_ids == tokens_of([3], 1, 0, 30)
            assert groups[0].kept == [], "it is the last one that serves"
            lost.engines += engines[3:]  # one to heal it, one for its restart
            lost.failures = 0
            assert (await restarting).replicas == 2 and groups[0].kept == [False]

    with_engines(5, main)


def test_the_last_one_that_serves_is_not_ended_though_its_turn_has_come() -> None:
    async def main(*engines: ServedEngine) -> None:
        groups = [PlayedGroup([engines[0], engines[2]]), PlayedGroup([engines[1]], failures=10**6, max_restarts=10**6)]
        async with Played(groups) as server:
            task = asked(server.frontend, 3, 100)
            await until(lambda: server.open == [1, 0])
            restarting = asyncio.create_task(server.upkeep.restart(LONG_S))
            await until(lambda: server.frontend.fleet.replicas[0].held)
            groups[1].fail()
            server.frontend.fault("its process died", 1)
            assert (await task)[0].samples[0].token_ids == tokens_of([3], 1, 0, 100)
            assert (await asked(server.frontend, 4, 10))[0].samples[0].token_ids == tokens_of([4], 1, 0, 10)
            assert groups[0].kept == [] and server.states == [State.SERVING]
            groups[1].engines += engines[3:]
            groups[1].failures = 0
            assert (await restarting).replicas == 2
            assert groups[0].kept == [False] and server.states == [State.SERVING]

    with_engines(5, main)


def test_a_replica_that_cannot_be_healed_stays_out_until_a_restart_is_asked_for() -> None:
    async def main(*engines: ServedEngine) -> None:
        groups = [PlayedGroup([engines[0], engines[2]]), PlayedGroup([engines[1]], failures=2, max_restarts=2)]
        async with Played(groups) as server:
            groups[1].fail()
            server.frontend.fault("its process died", 1)
            await until(lambda: "stays out until" in server.frontend.fault_cause, 30.0)
            assert server.frontend.state is State.SERVING and not server.tasks[0].done()
            groups[1].engines.append(engines[3])
            assert await server.upkeep.restart(0.0) == Restarted(2, 0)
            assert server.frontend.fault_cause == ""

    with_engines(4, main)


def test_where_no_replica_can_be_healed_the_last_cause_ends_the_server() -> None:
    async def main(*engines: ServedEngine) -> None:
        groups = [PlayedGroup([engine], failures=9, max_restarts=1) for engine in engines]
        async with Played(groups) as server:
            for index, group in enumerate(groups):
                group.fail(f"rank 0 on node-{index}: gone")
                server.frontend.fault(f"rank 0 on node-{index}: gone", index)
            with pytest.raises(WorkerError, match="the engine is gone: rank 0 on node-"):
                await server.tasks[0]

    with_engines(2, main)


def test_a_new_engine_whose_canary_fails_stops_the_restart_and_gets_nothing_new() -> None:
    async def main(*engines: ServedEngine) -> None:
        engines[2].engine.canary_fault = "rank 0 computes nonsense"
        groups = [PlayedGroup([engines[0], engines[2]]), PlayedGroup([engines[1]])]
        async with Played(groups) as server:
            with pytest.raises(WorkerError, match="replica 0 was started anew, and its canary: rank 0 computes"):
                await server.upkeep.restart(0.0)
            await asked(server.frontend, 1, 5)
            assert engines[2].engine.submitted == 0 and groups[1].kept == []
            assert server.readiness.ready and not server.tasks[0].done()

    with_engines(3, main)


def test_what_was_trained_and_not_saved_is_not_thrown_away() -> None:
    async def main(first: ServedEngine) -> None:
        async with Played([PlayedGroup([first])]) as server:
            server.frontend.weights.note(TrainCall(kind=Kind.TRAIN_STEP), TrainAnswer(step=2, weight_version=2))
            with pytest.raises(RestartRefused, match="would be lost; save it"):
                await server.upkeep.restart(0.0)
            saved = TrainCall(kind=Kind.SAVE, name="s")
            server.frontend.weights.note(saved, TrainAnswer(step=2, weight_version=2))
            assert not server.frontend.weights.unsaved

    with_engines(1, main)


def test_a_restart_that_was_asked_for_is_not_counted_as_a_fault() -> None:
    async def main(*engines: ServedEngine) -> None:
        group = PlayedGroup(list(engines), max_restarts=0)
        async with Played([group]) as server:
            for _ in range(2):
                assert await server.upkeep.restart(0.0) == Restarted(1, 0)
            assert server.upkeep._healers[0]._restarts.total == 0 and RESTARTED in (group.fault or RESTARTED)

    with_engines(3, main)
