"""One request ends the engines that run it: it is found and refused, and everybody else gets every token."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.actors.group.placement import PlacementConfig
from cluster.engine.request import Pooling, Request, SamplingParams, StoppingCriteria, TokenEvent
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.ledger.request_ledger import Ledger
from cluster.frontend.readiness import Readiness
from cluster.frontend.requests import content_hash
from cluster.frontend.requests.call import FrontendConfig
from cluster.frontend.requests.content_hash import ContentKeys
from cluster.frontend.requests.quarantine import QUARANTINE_S, Death, Quarantine, Suspicion
from cluster.link.local_link import LocalLink
from cluster.request_errors import Quarantined
from cluster.training.train_calls import Kind, TrainAnswer, TrainCall, TrainSequence
from launch.serving.healing import Restarts
from tests.cluster.frontend.fakes import CODEC, LIMITS, FakeEngine, tokens_of
from tests.cluster.frontend.harness import answer, call, run, serving, until

PATIENT = FrontendConfig(recovery_seconds=60.0)
POISON = (3, 3, 3)


@dataclass
class Poisoned(FakeEngine):
    """Dies in the step that computes the poison prompt's token at place `at`, and of nothing else."""

    at: int = 0
    seen: list[int] = field(default_factory=list)

    def step(self) -> list[TokenEvent]:
        for live in self.live.values():
            if live.request.token_ids[:3] == POISON and max(map(len, live.samples.values())) >= self.at:
                self.seen.append(len(self.live))
                raise RuntimeError("killed by what it was asked")
        return super().step()


class Healed:
    """A front-end whose engines are replaced as they die, each proved by a canary."""

    def __init__(self, replicas: int = 1, ledger: Ledger | None = None, **engine: Any) -> None:
        self.engine, self.deaths = engine, 0
        links = [self._link() for _ in range(replicas)]
        self.frontend = Frontend(links, codec=CODEC, config=PATIENT, ledger=ledger)
        self.frontend.start()
        self.readiness = Readiness(self.frontend, timeout_s=60.0)
        self.tasks = [asyncio.create_task(self._heal()), asyncio.create_task(self.readiness.run())]

    def _link(self) -> LocalLink:
        return LocalLink(Poisoned(step_seconds=0.002, **self.engine))

    async def _heal(self) -> None:
        while True:
            for replica in self.frontend.fleet.replicas:
                if replica.seat is None:
                    self.deaths += 1
                    await self.frontend.reattach(self._link(), replica.index)
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await self.frontend.close()


def lasting(prompt: list[int], **fields: Any) -> Any:
    return call(prompt, stopping=StoppingCriteria(max_new_tokens=100), **fields)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("at", [0, 5])
def test_a_poison_request_ends_at_two_deaths_and_costs_nobody_a_token(replicas: int, at: int) -> None:
    async def main() -> None:
        healed = Healed(replicas, at=at)
        others = [asyncio.create_task(answer(healed.frontend, lasting([i]))) for i in range(4)]
        await asyncio.sleep(0.05)
        with pytest.raises(Quarantined, match="engines died while it was running .*killed by what it was") as told:
            await answer(healed.frontend, lasting(list(POISON)))
        assert told.value.deaths in (2, 3) and healed.deaths <= 3
        for i, other in enumerate(others):
            assert (await other)[0].samples[0].token_ids == tokens_of([i], 1, 0, 100)
        with pytest.raises(Quarantined):
            await answer(healed.frontend, lasting(list(POISON)))
        assert healed.deaths <= 3 and healed.frontend.quarantine.total == 1, "the second was refused at the door"
        assert (await answer(healed.frontend, lasting([7])))[0].samples[0].token_ids == tokens_of([7], 1, 0, 100)
        await healed.close()

    run(main())


def test_of_many_that_start_together_each_is_tried_alone_and_only_the_guilty_one_is_refused() -> None:
    async def main() -> None:
        healed = Healed(at=0)
        prompts = [[i, i] for i in range(6)] + [list(POISON)] + [[i, 1, 2] for i in range(6)]
        await until(lambda: healed.readiness.ready)
        stream = await healed.frontend.open(call(*prompts, stopping=StoppingCriteria(max_new_tokens=40)))
        got: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
        errors: dict[int, Exception] = {}
        async for chunk in stream:
            got[chunk.prompt_index] += chunk.token_ids
            if chunk.error is not None:
                errors[chunk.prompt_index] = chunk.error
        assert list(errors) == [6] and isinstance(errors[6], Quarantined) and healed.deaths == 3
        assert all(got[i] == tokens_of(prompts[i], 1, 0, 40) for i in got if i != 6)
        await healed.close()

    run(main())


@pytest.mark.parametrize("reading", [{"score": True}, {"pooled": True}])
def test_requests_that_give_no_token_count_too(reading: dict[str, bool]) -> None:
    quarantine = Quarantine()
    pooling = Pooling() if "pooled" in reading else None
    request = Request(request_id="x", token_ids=POISON, score_only="score" in reading, pooling=pooling)
    suspect = Held(request)
    assert quarantine.died([suspect], Death(0, "a")) is None
    assert quarantine.died([suspect], Death(0, "b")) is suspect
    assert "a; b" in str(quarantine.convict(suspect)) and quarantine.refusal(suspect.keys) is not None


@dataclass(eq=False)
class Held:
    """A suspect without a front-end."""

    request: Request
    suspicion: Suspicion | None = None
    unfinished: tuple[int, ...] = (0,)
    begun: bool = False

    def content_key(self, keys: ContentKeys) -> bytes:
        return keys.of(self.request, seed=False)

    def keys(self) -> list[bytes]:
        return [self.content_key(ContentKeys())]


def test_one_that_went_on_between_two_deaths_is_no_more_guilty_than_before() -> None:
    quarantine = Quarantine()
    suspect = Held(Request(request_id="x", token_ids=(1,)))
    for cause in "abc":
        assert quarantine.died([suspect], Death(0, cause)) is None
        quarantine.gained(suspect, 0, 20)
        assert suspect.suspicion is None, "cleared"
    for _ in range(4):
        assert quarantine.died([suspect], Death(0, "nearby")) is None
        quarantine.gained(suspect, 0, 1)
    assert quarantine.died([suspect], Death(0, "nearby")) is suspect, "so often, always within a few tokens, alone"


def held(token: int, **fields: Any) -> Held:
    return Held(Request(request_id=f"r{token}", token_ids=(token,)), **fields)


def test_at_the_second_death_nobody_is_guilty_where_another_can_have_done_it() -> None:
    """A long call without tokens, and a rank that is killed twice from outside while others stream or arrive."""
    quarantine = Quarantine()
    long, stream = held(1), held(2, begun=True)
    assert quarantine.died([long, stream], Death(0, "a")) is None
    quarantine.gained(stream, 0, 3)
    assert quarantine.died([long, stream], Death(0, "b")) is None, "the stream is a suspect, too"
    assert all(each.suspicion is not None and each.suspicion.alone for each in (long, stream))
    assert quarantine.died([long, held(3, begun=True)], Death(0, "c")) is long, "tried alone"

    quarantine = Quarantine()
    quarantine.died([long := held(1)], Death(0, "a"))
    assert quarantine.died([long, held(4)], Death(0, "b")) is None, "it may have been the newcomer"
    assert quarantine.died([long, held(5)], Death(0, "c")) is long, "no newcomer can save it for ever"


def test_of_many_samples_those_that_wait_for_their_turn_do_not_make_it_guilty() -> None:
    quarantine = Quarantine()
    many = held(1, unfinished=tuple(range(64)))
    for cause in "abcd":
        assert quarantine.died([many], Death(0, cause)) is None
        for sample in range(8):
            quarantine.gained(many, sample, 20)
    for sample in range(64):
        quarantine.gained(many, sample, 16)
    assert many.suspicion is None


def test_copies_of_one_request_are_one_suspect() -> None:
    quarantine = Quarantine()
    copies = [held(1), held(1)]
    assert quarantine.died(copies, Death(0, "a")) is None
    assert quarantine.died(copies, Death(0, "b")) in copies


def test_an_engine_that_never_worked_accuses_nobody_and_a_lost_connection_is_no_death() -> None:
    quarantine = Quarantine()
    suspect = Held(Request(request_id="x", token_ids=(1,)))
    for _ in range(3):
        assert quarantine.died([suspect], Death(0, "at once", proved=False)) is None
    other = Held(Request(request_id="y", token_ids=(2,)))
    quarantine.died([other], Death(0, "connection lost"))
    quarantine.absolve(0)
    assert other.suspicion is None
    assert quarantine.died([other], Death(0, "real")) is None


def test_a_quarantine_ends_in_time_and_counts_and_verdicts_outlive_the_process(tmp_path: Path) -> None:
    now = [1000.0]
    ledger = Ledger(tmp_path / "state", "here")
    first = Quarantine(ledger.deaths, ledger.note_deaths, clock=lambda: now[0])
    guilty, suspected = Held(Request(request_id="x", token_ids=(1,))), Held(Request(request_id="y", token_ids=(2,)))
    first.died([guilty], Death(0, "one"))
    first.died([guilty, suspected], Death(0, "two"))
    first.convict(guilty)
    ledger.close()
    ledger = Ledger(tmp_path / "state", "here")
    again = Quarantine(ledger.deaths, ledger.note_deaths, clock=lambda: now[0])
    assert str(again.refusal(guilty.keys)).startswith("quarantined: 2 engines died")
    again.suspect(suspected, suspected.keys)
    assert again.died([suspected], Death(0, "three")) is suspected, "one death was in the process before"
    now[0] += QUARANTINE_S + 1
    assert again.refusal(guilty.keys) is None
    ledger.close()


def test_restarts_for_a_request_that_was_found_out_do_not_count() -> None:
    quarantine, restarts = Quarantine(), Restarts(PlacementConfig(max_restarts=1), lambda: 0.0)
    suspect = Held(Request(request_id="x", token_ids=(1,)))
    quarantine.died([suspect], Death(0, "one"))
    assert restarts.next_delay() == 0.0
    quarantine.died([suspect], Death(0, "two"))
    quarantine.convict(suspect)
    restarts.pardon(*quarantine.pardons(0))
    assert [restarts.next_delay() for _ in range(3)] == [0.0, 0.0, None] and restarts.total == 3


def test_a_seed_matters_only_where_something_was_drawn() -> None:
    sampled = Request(request_id="x", token_ids=(1,), sampling=SamplingParams(seed=4))
    other = replace(sampled, request_id="y", sampling=SamplingParams(seed=5))
    keys = ContentKeys()
    assert keys.of(sampled, seed=False) == keys.of(other, seed=False) and keys.of(sampled, True) != keys.of(other, True)


@pytest.mark.parametrize(
    "other",
    [
        {"token_ids": tuple(range(41))},
        {"sampling": SamplingParams(logit_bias=dict.fromkeys(range(1, 50), 0.5))},
        {"sampling": SamplingParams(logit_bias=dict.fromkeys(range(50), 0.25))},
        {"sampling": SamplingParams(bad_words=((1,),) * 40)},
        {"stopping": StoppingCriteria(stop_token_ids=tuple(range(30)))},
        {"stopping": StoppingCriteria(stop_sequences=("ab",) * 30)},
        {"score_only": True},
    ],
)
def test_content_is_the_same_by_value_not_by_name(other: dict[str, Any]) -> None:
    def made(**fields: Any) -> Request:
        sampling = SamplingParams(logit_bias=dict.fromkeys(range(50), 0.5))
        return Request(**{"request_id": str(fields), "token_ids": tuple(range(40)), "sampling": sampling, **fields})

    assert ContentKeys().both(made()) == ContentKeys().both(made(request_id="another"))
    assert not set(ContentKeys().both(made())) & set(ContentKeys().both(made(**other)))


def test_nothing_is_hashed_while_nothing_is_suspected_and_a_calls_lists_are_hashed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed: list[int] = []
    digest = content_hash._bytes

    def counted(value: Any) -> bytes:
        hashed.append(len(value))
        return digest(value)

    monkeypatch.setattr(content_hash, "_bytes", counted)
    biases = dict.fromkeys(range(1000), 0.5)

    async def main() -> None:
        async with serving(FakeEngine(replace(LIMITS, vocab_size=1000))) as frontend:
            asked = call(*[[i] for i in range(9)], sampling=SamplingParams(logit_bias=biases))
            await answer(frontend, asked)
            assert not hashed
            frontend.quarantine.died([Held(Request(request_id="x", token_ids=(1,)))], Death(0, "a"))
            hashed.clear()
            await answer(frontend, asked)
            assert hashed.count(1000) == 1

    run(main())


def test_a_training_call_that_is_sent_again_after_it_killed_an_engine_is_refused_at_its_second_death() -> None:
    step = TrainCall(kind=Kind.TRAIN_STEP, sequences=(TrainSequence(token_ids=(1, 2, 3)),), expected_step=0)

    def dies(asked: TrainCall) -> TrainAnswer:
        if asked.kind is Kind.TRAIN_STEP:
            raise RuntimeError("killed by a batch")
        return TrainAnswer(step=0, weight_version=0)

    async def main() -> None:
        frontend = Frontend(LocalLink(FakeEngine(), dies), codec=CODEC, config=PATIENT)
        frontend.start()
        for death in (1, 2):
            await answer(frontend, call([1]))  # the engine has proved to work
            with pytest.raises(Exception) as told:
                await frontend.train(replace(step, idempotency_key=f"try {death}"))
            assert isinstance(told.value, Quarantined) is (death == 2)
            await until(lambda: frontend.state is State.RECOVERING)
            await frontend.reattach(LocalLink(FakeEngine(), dies))
        with pytest.raises(Quarantined, match="2 engines died"):
            await frontend.train(step)
        assert frontend.state is State.SERVING
        await frontend.close()

    run(main())
