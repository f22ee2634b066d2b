"""Long training calls beside streams: engine steps between their parts, the same bits, and giving up half-way."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest

from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, ResponseOptions, SamplingParams, StoppingCriteria
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from cluster.link.engine_loop import EngineLoop
from cluster.link.engine_server import EngineServer
from cluster.link.local_link import LocalLink
from cluster.link.socket_link import SocketLink
from cluster.training.service.train_coordinator import TrainCoordinator
from cluster.training.service.train_worker import TrainWorker
from cluster.training.step.trainer import TrainerConfig
from cluster.training.train_calls import InParts, Kind, Later, TrainAnswer, TrainCall, TrainingCancelled, TrainSequence
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.frontend.fakes import FakeEngine
from tests.cluster.frontend.harness import call, run, until
from tests.cluster.frontend.training.test_train_requests import KEY, frontend_over, step
from tp_decoders import load

CONFIG = EngineConfig(kv_blocks=64, max_sequences=8)
SEQUENCES = tuple(TrainSequence(token_ids=tuple((7 * i + j) % 89 for j in range(5))) for i in range(12))
ANSWER = TrainAnswer(step=1, weight_version=1)


class Parts:
    """A call of so many parts; notes at which engine step each came."""

    def __init__(self, engine: FakeEngine, count: int, seconds: float = 0.0) -> None:
        self.engine, self.left, self.seconds = engine, count, seconds
        self.at: list[int] = []
        self.cancelled = threading.Event()

    def __call__(self, asked: TrainCall) -> TrainAnswer | InParts:
        if asked.kind is Kind.STATE:
            return ANSWER
        return self.advance() or InParts(self.advance, self.cancelled.set)

    def advance(self) -> TrainAnswer | None:
        time.sleep(self.seconds)
        self.at.append(self.engine.steps)
        self.left -= 1
        return ANSWER if self.left <= 0 else None


def test_there_are_engine_steps_between_any_two_parts_of_a_call() -> None:
    async def main() -> None:
        engine = FakeEngine(step_seconds=0.001)
        parts = Parts(engine, 12)
        frontend = await frontend_over(LocalLink(engine, parts))
        stream = await frontend.open(call([1], stopping=StoppingCriteria(max_new_tokens=200)))
        await until(lambda: engine.steps > 2)
        await frontend.train(step(0))
        assert len(set(parts.at)) == 12
        stream.close()
        await frontend.close()

    run(main())


def test_engine_steps_get_as_much_time_as_training_while_there_are_requests_and_none_else() -> None:
    async def main() -> None:
        engine = FakeEngine(step_seconds=0.002)
        parts = Parts(engine, 6, seconds=0.04)
        frontend = await frontend_over(LocalLink(engine, parts))
        await frontend.train(step(0))
        assert set(parts.at) == {0}, "nothing to wait for"
        parts.left, parts.at = 6, []
        stream = await frontend.open(call([1], stopping=StoppingCriteria(max_new_tokens=10**6)))
        await until(lambda: engine.steps > 2)
        await frontend.train(step(1))
        between = [b - a for a, b in zip(parts.at, parts.at[1:], strict=False)]
        assert min(between) >= 2, between
        stream.close()
        await frontend.close()

    run(main())


@pytest.mark.parametrize("over_a_connection", [False, True])
def test_a_caller_that_leaves_ends_its_call_between_two_parts_and_the_next_goes_on(over_a_connection: bool) -> None:
    engine = FakeEngine()
    parts = Parts(engine, 10**6, seconds=0.002)

    async def main(link: Any) -> None:
        frontend = await frontend_over(link)
        long = asyncio.create_task(frontend.train(step(0)))
        await until(lambda: len(parts.at) > 2)
        assert (await frontend.train(TrainCall(kind=Kind.STATE))).step == 1, "answered meanwhile"
        long.cancel()
        await until(parts.cancelled.is_set)
        parts.left = 1
        assert await frontend.train(step(0)) == ANSWER
        await frontend.close()

    if not over_a_connection:
        return run(main(LocalLink(engine, parts)))
    server = EngineServer(engine, KEY, training=parts)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        run(main(SocketLink(server.address, KEY)))
    finally:
        server.stop()
        thread.join(60)


def test_what_takes_effect_later_waits_for_the_call_under_way() -> None:
    """A load whose files have been read, say, may not change the weights between two micro-batches."""
    engine, order, read = FakeEngine(), list[str](), Future[None]()

    def loaded() -> TrainAnswer:
        order.append("load")
        return ANSWER

    def train(asked: TrainCall) -> TrainAnswer | Later | InParts:
        if asked.kind is Kind.LOAD:
            return Later(read, loaded, exclusive=True)
        left = [20]

        def advance() -> TrainAnswer | None:
            order.append("part")
            if left[0] == 10:
                read.set_result(None)
            left[0] -= 1
            return None if left[0] else ANSWER

        return InParts(advance, lambda: None)

    loop = EngineLoop(engine, lambda news: None, training=train)
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    read_first = loop.train(TrainCall(kind=Kind.LOAD))
    loop.train(step(0)).result(60)
    read_first.result(60)
    loop.stop()
    thread.join(60)
    assert order == ["part"] * 20 + ["load"]


def interleaved(group: Group, folder: str, streams: int, cancels: bool) -> Any:
    """Rank 0: what a ForwardBackward, a TrainStep and an Evaluate of several micro-batches gave beside streams."""
    runner = build_runner(load(folder, group=group), CONFIG, 1 << 28)
    commands = Commands(group.comm, 30.0)
    side = TrainWorker(runner, Groups(group, Group.single()), TrainerConfig(micro_batch_tokens=10))
    if group.rank > 0:
        follow(runner, commands, side.handlers)
        return None
    engine = build_engine(runner, CONFIG, (), commands if group.size > 1 else None)
    lead = TrainCoordinator(side, commands, engine.weights_changed)
    tokens: list[Any] = []
    for seed in range(streams):
        stopping = StoppingCriteria(max_new_tokens=60, ignore_eos=True)
        sampling, response = SamplingParams(seed=seed), ResponseOptions(logprobs=0)
        asked = Request(
            request_id=str(seed), token_ids=(seed, 3), sampling=sampling, stopping=stopping, response=response
        )
        engine.submit(asked)

    def stepped() -> None:
        tokens.extend((e.request_id, e.token_ids, e.weight_version) for e in engine.step() if e.token_ids)

    def drive(outcome: Any, give_up_after: int = 99) -> Any:
        while isinstance(outcome, InParts):
            stepped()
            give_up_after -= 1
            if not give_up_after:
                return outcome.cancel()
            outcome = outcome.advance() or outcome
        return outcome

    def train(kind: Kind, key: str) -> Any:
        answer = drive(lead(TrainCall(kind=kind, sequences=SEQUENCES, idempotency_key=key)))
        return answer.loss, answer.grad_norm, answer.logprobs, answer.step

    found = [train(Kind.EVALUATE, ""), train(Kind.FORWARD_BACKWARD, "a")]
    if cancels:
        for kind in (Kind.FORWARD_BACKWARD, Kind.TRAIN_STEP, Kind.EVALUATE):
            assert drive(lead(TrainCall(kind=kind, sequences=SEQUENCES, idempotency_key=f"c{kind}")), 3) is None
            assert side.state().waiting_calls == 1
    found += [train(Kind.TRAIN_STEP, "b"), train(Kind.TRAIN_STEP, "d")]
    while not engine.idle:
        stepped()
    engine.close()
    return found, tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("gpt2", tmp_path_factory.mktemp("gpt2")))


@pytest.mark.parametrize("size", [1, 2])
def test_training_beside_streams_given_up_calls_included_gives_the_bits_of_training_alone(
    ranks: Any, folder: str, size: int
) -> None:
    alone, _ = interleaved(Group.single(), folder, 0, False)
    beside, tokens = ranks(size, interleaved, folder, 3, True)[0]
    assert beside == alone
    assert {version for *_, version in tokens} >= {0, 1, 2}, "streams went on in between"


def test_a_call_that_was_given_up_says_so() -> None:
    engine = FakeEngine()
    parts = Parts(engine, 10**6, seconds=0.002)
    loop = EngineLoop(engine, lambda news: None, training=parts)
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    answer = loop.train(step(0))
    while len(parts.at) < 2:
        time.sleep(0.001)
    assert not answer.cancel(), "it runs"
    with pytest.raises(TrainingCancelled, match="nothing of it was applied"):
        answer.result(60)
    loop.stop()
    thread.join(60)
