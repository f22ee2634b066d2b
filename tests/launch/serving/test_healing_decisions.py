"""The healer's decisions, over a real link to a fake engine and a group that only plays what it is told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.actors.group.placement import PlacementConfig
from cluster.actors.programs.serve_program import ServeProgram
from cluster.engine.request import StoppingCriteria
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.requests.call import FrontendConfig
from cluster.training.train_calls import Kind, TrainAnswer, TrainCall
from launch.serving import healing
from launch.serving.healing import Healer, Restarts, Unhealable
from parallel.errors import WorkerError
from tests.cluster.frontend.fakes import CODEC, FakeEngine, tokens_of
from tests.cluster.frontend.harness import answer, call, run, until
from tests.cluster.link.test_socket_link import KEY, ServedEngine

CAUSE = "rank 1 on node-b: its process died (killed or crashed)"


class PlayedGroup:
    """A WorkerGroup whose rebuilds fail as often as told, and then give the next engine."""

    def __init__(self, engines: list[ServedEngine], failures: int = 0, **config: Any) -> None:
        self.config = PlacementConfig(**config)
        self.engines, self.failures = engines, failures
        self.fault: str | None = None
        self.kept: list[bool] = []
        self.specs: list[ServeProgram] = []
        self.tell_fault: Callable[[str], None]

    def observe(self, on_fault: Callable[[str], None]) -> None:
        self.tell_fault = on_fault

    def wait_fault(self, timeout: float) -> str | None:
        return self.fault

    def give_up(self, cause: str) -> None:
        self.fault = self.fault or cause

    def fail(self, cause: str = CAUSE) -> None:
        self.fault = cause
        self.tell_fault(cause)

    def rebuild(self, tell: Callable[[str], None], spec: ServeProgram, keep: bool) -> list[Any]:
        self.kept.append(keep)
        self.specs.append(spec)
        if self.failures:
            self.failures -= 1
            tell("waiting for room: somebody else has it")
            raise WorkerError(f"rank 0 on node-a did not start: trial {len(self.kept)}")
        self.fault = None
        return ready_of(self.engines.pop(0))


def ready_of(served: ServedEngine) -> list[Any]:
    facts = SimpleNamespace(engine_address=served.server.address, kv_blocks=77)
    return [SimpleNamespace(place="rank 0 on node-a", facts=facts)]


async def healed_by(group: PlayedGroup, first: ServedEngine) -> tuple[Frontend, asyncio.Task[None]]:
    link = await asyncio.to_thread(first.link)
    frontend = Frontend(link, codec=CODEC, config=FrontendConfig(recovery_seconds=60.0))
    frontend.start()
    healer = Healer(group, frontend, ServeProgram(model="m", authkey=KEY), ready_of(first))  # type: ignore[arg-type]
    return frontend, asyncio.create_task(healer.run())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "FIRST_DELAY_S", 0.01)


def long_call(prompt: list[int]) -> Any:
    return call(prompt, stopping=StoppingCriteria(max_new_tokens=150))


def with_engines(count: int, main: Callable[..., Any]) -> None:
    with ExitStack() as stack:
        run(main(*(stack.enter_context(ServedEngine(FakeEngine(step_seconds=0.02))) for _ in range(count))))


def test_the_first_attempt_keeps_survivors_the_next_ones_start_anew_with_the_cache_of_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main(first: ServedEngine, second: ServedEngine) -> None:
        group = PlayedGroup([second], failures=2)
        frontend, healing_task = await healed_by(group, first)
        monkeypatch.setattr(Healer, "_reconnected", None)  # not to be thought of: the group has said what happened
        states: list[State] = []
        frontend.observe(states.append)
        asked = asyncio.create_task(answer(frontend, long_call([4])))
        await until(lambda: first.engine.steps > 5)
        group.fail()
        (result,) = await asked
        assert result.samples[0].token_ids == tokens_of([4], 1, 0, 150)
        assert group.kept == [True, False, False]
        assert {spec.engine.kv_blocks for spec in group.specs} == {77} and group.specs[0].restore is None
        assert states == [State.SERVING, State.RECOVERING, State.SERVING]
        await asyncio.sleep(0.1)
        assert not healing_task.done(), "it waits for the next fault, not for news of this one"
        healing_task.cancel()
        await frontend.close()

    with_engines(2, main)


def test_what_is_waited_for_can_be_asked_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(first: ServedEngine) -> None:
        group = PlayedGroup([], failures=1)
        frontend, healing_task = await healed_by(group, first)
        told: list[str] = []
        monkeypatch.setattr(frontend, "waits_for", lambda what, _: told.append(what))
        group.fail()
        await until(lambda: len(told) == 2)
        assert told == ["waiting for room: somebody else has it", "rank 0 on node-a did not start: trial 1"]
        monkeypatch.undo()
        frontend.waits_for(told[0])
        assert frontend.fault_cause == told[0]
        healing_task.cancel()
        await frontend.close()

    with_engines(1, main)


def test_a_lost_connection_alone_is_made_again_and_no_rank_is_touched() -> None:
    async def main(first: ServedEngine) -> None:
        group = PlayedGroup([])
        frontend, healing_task = await healed_by(group, first)
        asked = asyncio.create_task(answer(frontend, long_call([5])))
        await until(lambda: first.engine.steps > 5)
        frontend.fleet.replicas[0].link._wire._hang_up()  # type: ignore[attr-defined]
        (result,) = await asked
        assert result.samples[0].token_ids == tokens_of([5], 1, 0, 150)
        assert group.kept == [] and frontend.state is State.SERVING
        healing_task.cancel()
        await frontend.close()

    with_engines(1, main)


def test_a_drain_waits_for_what_is_replayed() -> None:
    async def main(first: ServedEngine, second: ServedEngine) -> None:
        group = PlayedGroup([second])
        frontend, healing_task = await healed_by(group, first)
        asked = asyncio.create_task(answer(frontend, long_call([6])))
        await until(lambda: first.engine.steps > 5)
        group.fail()
        assert await frontend.drain(100.0) == 0
        assert (await asked)[0].samples[0].token_ids == tokens_of([6], 1, 0, 150)
        assert group.kept == [True]
        healing_task.cancel()
        await frontend.close()

    with_engines(2, main)


def test_attempts_within_the_window_have_an_end_that_names_the_fault_and_the_last_failure() -> None:
    async def main(first: ServedEngine) -> None:
        group = PlayedGroup([], failures=9, max_restarts=3, restart_window_s=60.0)
        frontend, healing_task = await healed_by(group, first)
        group.fail()
        with pytest.raises(Unhealable) as ended:
            await healing_task
        assert str(ended.value) == (
            f"the engine is gone: {CAUSE}; the last attempt to rebuild the group failed: rank 0 on node-a did not "
            "start: trial 3; 3 restarts within 60 s are the limit (placement.max_restarts)"
        )
        await frontend.close()

    with_engines(1, main)


def test_weights_that_were_trained_and_never_saved_end_the_server_instead_of_being_replaced() -> None:
    async def main(first: ServedEngine) -> None:
        group = PlayedGroup([])
        frontend, healing_task = await healed_by(group, first)
        frontend.weights.note(TrainCall(kind=Kind.TRAIN_STEP), TrainAnswer(step=2, weight_version=2))
        group.fail()
        with pytest.raises(Unhealable, match="its process died .*; 2 training steps were never saved"):
            await healing_task
        assert group.kept == []
        await frontend.close()

    with_engines(1, main)


def test_waits_between_attempts_double_and_old_ones_are_forgotten() -> None:
    now = [0.0]
    restarts = Restarts(PlacementConfig(max_restarts=4, restart_window_s=100.0), lambda: now[0])
    assert [restarts.next_delay() for _ in range(5)] == [0.0, 0.01, 0.02, 0.04, None]
    now[0] = 101.0
    assert restarts.next_delay() == 0.0 and restarts.total == 5


def test_an_attempt_is_logged_with_the_time_it_took(caplog: pytest.LogCaptureFixture) -> None:
    async def main(first: ServedEngine, second: ServedEngine) -> None:
        group = PlayedGroup([second])
        frontend, healing_task = await healed_by(group, first)
        with caplog.at_level(logging.WARNING):
            group.fail()
            await until(lambda: "serving again" in caplog.text)
        assert f"s after the fault was seen: {CAUSE}" in caplog.text
        healing_task.cancel()
        await frontend.close()

    with_engines(2, main)


def test_an_engine_that_refuses_connections_is_tried_again_and_then_its_group_is_rebuilt_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, refused = healing.SocketLink, [0]

    def refusing(*args: Any) -> Any:
        refused[0] += 1
        if refused[0] <= healing.CONNECTS + 1:
            raise WorkerError("cannot reach the engine: refused")
        return real(*args)

    monkeypatch.setattr(healing, "CONNECT_PAUSE_S", 0.01)

    async def main(first: ServedEngine, second: ServedEngine, third: ServedEngine) -> None:
        group = PlayedGroup([second, third])
        frontend, healing_task = await healed_by(group, first)
        monkeypatch.setattr(healing, "SocketLink", refusing)
        asked = asyncio.create_task(answer(frontend, long_call([4])))
        await until(lambda: first.engine.steps > 5)
        group.fail()
        assert (await asked)[0].samples[0].token_ids == tokens_of([4], 1, 0, 150)
        assert group.kept == [True, False] and not healing_task.done()
        healing_task.cancel()
        await frontend.close()

    with_engines(3, main)


@pytest.mark.parametrize("error", [AssertionError("nobody thought of it"), KeyError("rank")])
def test_whatever_an_attempt_raises_the_next_one_is_made(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def main(first: ServedEngine, second: ServedEngine) -> None:
        group = PlayedGroup([second])
        real, failed = group.rebuild, [False]

        def rebuild(*args: Any) -> list[Any]:
            if not failed[0]:
                failed[0] = True
                raise error
            return real(*args)

        monkeypatch.setattr(group, "rebuild", rebuild)
        frontend, healing_task = await healed_by(group, first)
        group.fail()
        await until(lambda: frontend.state is State.SERVING and frontend.restarts == 1)
        healing_task.cancel()
        await frontend.close()

    with_engines(2, main)


def test_an_engine_that_is_condemned_is_replaced_and_none_of_its_ranks_is_kept() -> None:
    async def main(first: ServedEngine, second: ServedEngine) -> None:
        group = PlayedGroup([second])
        link = await asyncio.to_thread(first.link)
        frontend = Frontend(link, codec=CODEC, config=FrontendConfig(recovery_seconds=60.0))
        frontend.start()
        healer = Healer(group, frontend, ServeProgram(model="m", authkey=KEY), ready_of(first))  # type: ignore[arg-type]
        task = asyncio.create_task(healer.run())
        healer.condemn("its engine hangs")
        assert frontend.fault_cause == "rank 0 on node-a: its engine hangs"
        await until(lambda: frontend.state is State.SERVING)
        assert group.kept == [False]
        task.cancel()
        await frontend.close()

    with_engines(2, main)
