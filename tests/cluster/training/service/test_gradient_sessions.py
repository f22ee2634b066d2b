"""Whose gradients wait: those of two callers never add up, and nobody goes on without knowing what was dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engine.run.command_stream import Commands
from cluster.training.service.gradient_sessions import GradientSessions
from cluster.training.service.idempotency import ALL_BYTES, CALLER_BYTES, CALLER_KEYS, IdempotencyCache
from cluster.training.service.train_coordinator import TrainCoordinator
from cluster.training.service.train_worker import SaveConfig, TrainWorker
from cluster.training.train_calls import (
    AnswerDropped,
    Kind,
    Later,
    NotApplied,
    OpenSession,
    SessionOpen,
    StepConflict,
    TrainAnswer,
    TrainCall,
)
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from tests.cluster.engine.tiny_models import save_tiny
from tests.cluster.training.service.test_train_worker import DOCUMENTS, runner_of


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lead(tmp_path: Path, clock: Clock) -> TrainCoordinator:
    runner = runner_of(str(save_tiny("gpt2", tmp_path / "gpt2")))
    side = TrainWorker(runner, Groups(Group.single(), Group.single()), saves=SaveConfig(root=tmp_path))
    made = TrainCoordinator(side, Commands(None), lambda: None)
    made._sessions = GradientSessions(60.0, clock)
    return made


def ask(lead: TrainCoordinator, kind: Kind, caller: str, key: str = "", **fields: Any) -> TrainAnswer:
    sequences = DOCUMENTS if kind.takes_sequences else ()
    outcome = lead(TrainCall(kind=kind, caller=caller, idempotency_key=key, sequences=sequences, **fields))
    while not isinstance(outcome, TrainAnswer):
        assert isinstance(outcome, Later), "small calls have one part"
        outcome.done.result(60)
        outcome = outcome.finish()
    return outcome


ADD, STEP, APPLY, DROP, STATE = (
    Kind.FORWARD_BACKWARD, Kind.TRAIN_STEP, Kind.OPTIM_STEP, Kind.DROP, Kind.STATE
)  # fmt: skip


def test_whoever_comes_second_is_told_whose_session_is_open_and_since_when(
    lead: TrainCoordinator, clock: Clock
) -> None:
    ask(lead, ADD, "alice", "a", session="rl")
    clock.now += 7
    words = "session 'rl' of alice holds the gradients of 1 calls since 7 s.* in 53 s"
    for kind in (ADD, STEP, APPLY):
        with pytest.raises(SessionOpen, match=words):
            ask(lead, kind, "bob", "b")
        with pytest.raises(SessionOpen, match=words):
            ask(lead, kind, "alice", "c", session="other")
    ask(lead, Kind.EVALUATE, "bob")
    state = ask(lead, STATE, "bob")
    assert state.sessions == (OpenSession("alice", "rl", 1, 7.0, 7.0),) and state.waiting_calls == 1
    ask(lead, APPLY, "alice", "d", session="rl")
    assert ask(lead, ADD, "bob", "b").waiting_calls == 1 and ask(lead, STATE, "").sessions[0].caller == "bob"


def test_the_owner_drops_its_gradients_and_is_not_told_again(lead: TrainCoordinator) -> None:
    first = ask(lead, ADD, "alice", "a")
    assert ask(lead, DROP, "bob").dropped == 0 and ask(lead, STATE, "").waiting_calls == 1
    assert ask(lead, DROP, "alice").dropped == 1 and ask(lead, STATE, "").sessions == ()
    with pytest.raises(NotApplied, match="its gradient was dropped since, by its owner.*under a new key"):
        ask(lead, ADD, "alice", "a")
    again = ask(lead, ADD, "alice", "b")
    assert again.loss == first.loss and again.waiting_calls == 1 and not again.replayed


def test_whoever_lost_gradients_to_another_learns_it_before_going_on(lead: TrainCoordinator, clock: Clock) -> None:
    ask(lead, ADD, "alice", "a")
    clock.now += 61
    alone = ask(lead, STEP, "bob", "b")
    with pytest.raises(NotApplied, match="were dropped, as nothing was added for 61 s and bob called TrainStep"):
        ask(lead, ADD, "alice", "c")
    ask(lead, ADD, "alice", "c")
    assert ask(lead, APPLY, "alice", "d").step == alone.step + 1


def test_who_controls_the_server_drops_anybodys_and_a_retry_tells_the_owner(lead: TrainCoordinator) -> None:
    ask(lead, ADD, "alice", "a", session="rl")
    assert ask(lead, DROP, "root", owner="alice", session="rl").dropped == 1
    with pytest.raises(NotApplied, match="by root, who controls the server"):
        ask(lead, ADD, "alice", "a", session="rl")
    assert ask(lead, ADD, "alice", "b", session="rl").waiting_calls == 1, "told once is enough"


def test_a_replay_says_what_waits_now_and_every_answer_which_memory_it_is_of(lead: TrainCoordinator) -> None:
    ask(lead, ADD, "alice", "a")
    assert (again := ask(lead, ADD, "alice", "a")).replayed and again.waiting_calls == 1
    done = ask(lead, APPLY, "alice", "b")
    late = ask(lead, ADD, "alice", "a")
    assert late.replayed and late.waiting_calls == 0
    assert {again.incarnation, done.incarnation, late.incarnation, ask(lead, STATE, "").incarnation} == {
        lead._incarnation
    }


def test_what_began_before_a_rebuild_is_not_applied_in_part_after_it(lead: TrainCoordinator) -> None:
    """One of two gradients is lost with the ranks; somebody of the same name has asked where training stands since."""
    meant = ask(lead, Kind.FORWARD_BACKWARD, "a", "first", expected_incarnation=lead._incarnation).incarnation
    ask(lead, Kind.DROP, "a")
    lead._incarnation, lead._idempotency = meant + 1, IdempotencyCache()  # as of new ranks
    ask(lead, Kind.FORWARD_BACKWARD, "a", "second", expected_step=0)  # says nothing of what it belongs to
    weights = [p.detach().clone() for p in lead._side._runner.model.parameters()]
    for kind in (Kind.TRAIN_STEP, Kind.FORWARD_BACKWARD, Kind.OPTIM_STEP, Kind.EVALUATE, Kind.SAVE, Kind.LOAD):
        with pytest.raises(StepConflict, match="gradients and keys of before are gone"):
            ask(lead, kind, "a", "third", name="x", expected_step=0, expected_incarnation=meant)
    stands = ask(lead, Kind.STATE, "a")
    assert (stands.step, stands.waiting_calls, stands.incarnation) == (0, 1, meant + 1)
    assert all(torch.equal(a, b) for a, b in zip(weights, lead._side._runner.model.parameters(), strict=True))
    assert ask(lead, Kind.OPTIM_STEP, "a", "third", expected_incarnation=stands.incarnation).step == 1


def test_a_load_drops_its_callers_gradients_and_waits_for_those_of_others(lead: TrainCoordinator) -> None:
    ask(lead, Kind.SAVE, "alice", name="one")
    ask(lead, ADD, "alice", "a", session="rl")
    with pytest.raises(SessionOpen):
        ask(lead, Kind.LOAD, "bob", "b", name="one")
    assert ask(lead, Kind.LOAD, "alice", "c", name="one").waiting_calls == 0
    assert not ask(lead, ADD, "alice", "a", session="rl").replayed, "keys of what was undone may be used again"


def keyed(caller: str, key: str) -> TrainCall:
    return TrainCall(kind=Kind.EVALUATE, caller=caller, idempotency_key=key)


def large(step: int, count: int = 131072) -> TrainAnswer:
    return TrainAnswer(step=step, weight_version=0, logprobs=(tuple(float(i % 97) / 8 for i in range(count)),))


def test_answers_are_bounded_in_bytes_and_one_that_went_is_not_given_as_unknown() -> None:
    cache, answer = IdempotencyCache(), large(3)
    cache.remember(keyed("alice", "mine"), large(1, 10))
    for number in range(40):
        cache.remember(keyed("bob", str(number)), answer)
    held = cache._of["bob"]
    assert held.nbytes <= CALLER_BYTES and len(held.calls) == 40
    with pytest.raises(AnswerDropped, match="was applied .the step was 3 after it.*not applied again"):
        cache.find(keyed("bob", "0"))
    last = cache.find(keyed("bob", "39"))
    assert last is not None and last.logprobs == answer.logprobs and last.replayed
    mine = cache.find(keyed("alice", "mine"))
    assert mine is not None and mine.logprobs == large(1, 10).logprobs, "another's answers push out none of mine"


def test_all_callers_together_are_bounded_and_the_largest_gives_way() -> None:
    cache, answer = IdempotencyCache(), large(3)
    cache.remember(keyed("small", "a"), large(1, 1000))
    for caller in range(12):
        for number in range(16):
            cache.remember(keyed(f"caller {caller}", str(number)), answer)
    assert cache.nbytes <= ALL_BYTES
    found = cache.find(keyed("small", "a"))
    assert found is not None and len(found.logprobs[0]) == 1000


def test_keys_are_known_longer_than_answers_and_bounded_too() -> None:
    cache = IdempotencyCache()
    for number in range(CALLER_KEYS + 1):
        cache.remember(keyed("bob", str(number)), large(number, 1))
    assert cache.find(keyed("bob", "0")) is None and cache.find(keyed("bob", "1")) is not None
