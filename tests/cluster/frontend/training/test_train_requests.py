"""Training calls on their way to an engine: one between two steps, cancelled before their turn, ended by a fault."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from cluster.engine.request import StoppingCriteria
from cluster.frontend.frontend import Frontend
from cluster.link.engine_server import EngineServer
from cluster.link.local_link import LocalLink
from cluster.link.socket_link import SocketLink
from cluster.training.train_calls import Kind, StepConflict, TrainAnswer, TrainCall, TrainSequence
from parallel.errors import CollectiveError, TpError
from tests.cluster.frontend.fakes import CODEC, FakeEngine
from tests.cluster.frontend.harness import call, run, until

KEY = b"k" * 32


def step(number: int) -> TrainCall:
    return TrainCall(
        kind=Kind.TRAIN_STEP, sequences=(TrainSequence(token_ids=(1, 2)),), expected_step=number
    )  # fmt: skip


async def frontend_over(link: LocalLink | SocketLink) -> Frontend:
    frontend = Frontend(link, codec=CODEC)
    frontend.start()
    return frontend


def test_training_calls_that_wait_together_take_turns_with_the_engines_steps() -> None:
    async def main() -> None:
        engine, at = FakeEngine(step_seconds=0.002), []

        def train(asked: TrainCall) -> TrainAnswer:
            at.append(engine.steps)
            return TrainAnswer(step=1, weight_version=1)

        frontend = await frontend_over(LocalLink(engine, train))
        stream = await frontend.open(call([1], stopping=StoppingCriteria(max_new_tokens=100)))
        await until(lambda: engine.steps > 2)
        await asyncio.gather(*(frontend.train(step(i)) for i in range(8)))
        assert len(set(at)) == 8, "no two between the same two steps"
        stream.close()
        await frontend.close()

    run(main())


def test_over_a_connection_a_call_cancelled_before_its_turn_never_runs_and_errors_come_back() -> None:
    ran: list[int | None] = []
    go = threading.Event()

    def train(asked: TrainCall) -> TrainAnswer:
        assert go.wait(60)
        ran.append(asked.expected_step)
        if asked.expected_step == 2:
            raise StepConflict("told to refuse")
        return TrainAnswer(step=7, weight_version=1, logprobs=((-1.5,),))

    async def main(server: EngineServer) -> None:
        frontend = await frontend_over(SocketLink(server.address, KEY))
        calls = [asyncio.create_task(frontend.train(step(i))) for i in range(3)]
        await until(lambda: len(server._trainings) == 3)
        waiting = server._trainings[sorted(server._trainings)[1]]
        calls[1].cancel()
        await until(waiting.cancelled)
        go.set()
        assert (await calls[0]).logprobs == ((-1.5,),)
        with pytest.raises(StepConflict, match="told to refuse"):
            await calls[2]
        assert ran == [0, 2]
        await frontend.close()

    with_server(train, main)


def with_server(train: Callable[[TrainCall], TrainAnswer], main: Callable[[EngineServer], object]) -> None:
    server = EngineServer(FakeEngine(), KEY, training=train)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        run(main(server))  # type: ignore[arg-type]
    finally:
        server.stop()
        thread.join(60)


def test_a_rank_lost_in_a_training_step_ends_every_call_with_the_cause() -> None:
    def train(asked: TrainCall) -> TrainAnswer:
        raise CollectiveError("rank 1 is gone")

    async def main() -> None:
        frontend = await frontend_over(LocalLink(FakeEngine(), train))
        calls = [asyncio.create_task(frontend.train(step(i))) for i in range(2)]
        for asked in calls:
            with pytest.raises(TpError, match="rank 1 is gone"):
                await asked
        await frontend.close()

    run(main())
