"""The ledger by itself: what was written is known again after a kill, and neither memory nor disk grows without end."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cluster.engine.request import FinishReason, TokenEvent
from cluster.frontend.ledger.ledger_records import Progress
from cluster.request_errors import RequestIdReused
from tests.cluster.frontend.ledger.ledgers import (
    ALICE,
    BOB,
    base_written,
    begun,
    ended_call,
    killed,
    last_log,
    ledger_at,
    step,
    tokens_of,
)


def test_open_and_ended_calls_are_known_again_after_a_kill(tmp_path: Path) -> None:
    first = ledger_at(tmp_path / "state")
    ended, running = begun(first), begun(first, BOB, prompts=2)
    step(first, ended, 5, 6)
    step(first, running, 7, prompt=1)
    step(first, ended, 8, end=True)
    first.prompt_over(ended, complete=True)
    killed(first)
    second = ledger_at(tmp_path / "state")
    found, going = second.find(ALICE, b"digest"), second.find(BOB, b"digest")
    assert found is not None and found.progress is Progress.ENDED and tokens_of(found) == (5, 6, 8)
    (event,) = found.unpacked().events(0)
    assert event.finish_reason is FinishReason.LENGTH and [e.token_id for e in event.logprobs] == [5, 6, 8]
    assert second.unfinished() == [going] and tokens_of(going, 1) == (7,) and tokens_of(going, 0) == ()
    assert found.unpacked().requests[0].sampling.seed == 3  # type: ignore[union-attr]
    second.close()


def test_ids_belong_to_their_caller_and_to_what_was_asked(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path / "state")
    begun(ledger)
    assert ledger.find(ALICE, b"digest") is not None and ledger.find(BOB, b"digest") is None
    with pytest.raises(RequestIdReused, match="request_id 'one' was used for a call that asked something else"):
        ledger.find(ALICE, b"other")
    ledger.close()


def test_answers_are_forgotten_by_age_and_by_size_and_the_folder_stays_bounded(tmp_path: Path) -> None:
    now = [1000.0]
    state = tmp_path / "state"
    ledger = ledger_at(state, clock=lambda: now[0], retain_seconds=10.0, retain_bytes=20_000, segment_bytes=10_000)
    rng = random.Random(1)
    for number in range(300):
        key = ("alice", str(number))
        record = begun(ledger, key)
        for _ in range(10):
            step(ledger, record, *(rng.randrange(50_000) for _ in range(5)))
        ledger.prompt_over(record, complete=True)
        assert ledger.retained_bytes <= 20_000
        base_written(ledger)  # it is written beside, and the log grows until it is there
        now[0] += 0.01
    assert ledger.find(("alice", "299"), b"digest") is not None and ledger.find(("alice", "0"), b"digest") is None
    ledger.close()  # waits for the base
    assert sum(path.stat().st_size for path in state.iterdir()) < 4 * 20_000 + 2 * 10_000
    now[0] += 9.0
    again = ledger_at(state, clock=lambda: now[0], retain_seconds=10.0, retain_bytes=20_000)
    assert tokens_of(again.find(("alice", "299"), b"digest")) and len(again) > 1
    now[0] += 2.0
    assert again.find(("alice", "299"), b"digest") is None and len(again) == again.retained_bytes == 0
    again.close()


def test_what_is_open_outlives_every_new_base(tmp_path: Path) -> None:
    state = tmp_path / "state"
    ledger = ledger_at(state, segment_bytes=2_000)
    record = begun(ledger)
    for token in range(400):
        step(ledger, record, token)
        if token % 50 == 0:
            base_written(ledger)
    killed(ledger)
    assert int(last_log(state).stem) > 3, "there were several"
    again = ledger_at(state)
    assert tokens_of(again.find(ALICE, b"digest")) == tuple(range(400))
    again.close()


def test_a_parked_call_is_taken_up_and_a_dropped_one_is_gone(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path / "state")
    parked, dropped = begun(ledger), begun(ledger, BOB)
    step(ledger, parked, 1)
    ledger.heard(parked, 0, TokenEvent(request_id="x", finish_reason=FinishReason.DEADLINE))
    ledger.prompt_over(parked, complete=True)
    ledger.drop(dropped)
    ledger.prompt_over(dropped, complete=False)
    assert parked.progress is Progress.PARKED and ledger.find(BOB, b"digest") is None
    killed(ledger)
    again = ledger_at(tmp_path / "state")
    assert again.find(BOB, b"digest") is None and not again.unfinished()
    found = again.find(ALICE, b"digest")
    assert found is not None and tokens_of(found) == (1,)
    again.reopen(found)
    found.open_prompts = 1
    step(again, found, 2, end=True)
    again.prompt_over(found, complete=True)
    killed(again)
    third = ledger_at(tmp_path / "state")
    last = third.find(ALICE, b"digest")
    assert tokens_of(last) == (1, 2) and last is not None and last.progress is Progress.ENDED
    third.close()


def test_another_model_s_records_are_left_out(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path / "state")
    begun(ledger)
    ledger.close()
    other = ledger_at(tmp_path / "state", origin="another model")
    assert len(other) == 0
    other.close()


def test_one_caller_s_answers_never_push_out_another_s(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path / "state", retain_bytes=50_000)
    ended_call(ledger, ALICE, 3)
    for number in range(100):
        ended_call(ledger, ("flood", str(number)), 200)
    assert ledger.retained_bytes <= 50_000
    assert ledger.find(ALICE, b"digest") is not None, "hers is the oldest, but she has the least"
    assert ledger.find(("flood", "0"), b"digest") is None and ledger.find(("flood", "99"), b"digest") is not None
    ledger.close()


def test_what_has_expired_leaves_the_disk_though_nobody_asks(tmp_path: Path) -> None:
    now, state = [1000.0], tmp_path / "state"
    ledger = ledger_at(state, clock=lambda: now[0], retain_seconds=10.0, rewrite_seconds=5.0)
    ended_call(ledger, ("secret caller", "id"), 3)
    base_written(ledger)

    def on_disk() -> bool:
        return any(b"secret caller" in path.read_bytes() for path in state.iterdir())

    ledger.tidy()
    assert on_disk() and len(ledger) == 1
    now[0] += 11.0
    ledger.tidy()
    base_written(ledger)
    assert not on_disk() and len(ledger) == 0
    ledger.tidy()
    ledger.close()
    ledger.tidy()


def test_long_answers_push_out_long_ones_before_a_short_one_of_the_same_caller(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path / "state", retain_bytes=50_000)
    ended_call(ledger, ALICE, 3)
    for number in range(100):
        ended_call(ledger, (ALICE[0], str(number)), 400)
    assert ledger.retained_bytes <= 50_000 and ledger.find(ALICE, b"digest") is not None
    assert ledger.find((ALICE[0], "0"), b"digest") is None and ledger.find((ALICE[0], "99"), b"digest") is not None
    ledger.close()


def test_a_call_that_is_taken_up_again_is_no_kept_answer_any_more(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path / "state")
    for key in (ALICE, ("alice", "two")):
        record = begun(ledger, key)
        step(ledger, record, 1, 2, 3)
        ledger.prompt_over(record, complete=False)
    kept = ledger.retained_bytes
    for key in (ALICE, ("alice", "two")):
        found = ledger.find(key, b"digest")
        assert found is not None
        ledger.reopen(found)
        assert ledger.retained_bytes in (kept // 2, 0)
    assert ledger.retained_bytes == 0
    ledger.close()


def test_a_base_that_begins_within_a_step_neither_loses_nor_doubles_what_was_heard(tmp_path: Path) -> None:
    state = tmp_path / "state"
    ledger = ledger_at(state)
    record, other = begun(ledger), begun(ledger, BOB)
    step(ledger, record, 1)
    ledger.heard(record, 0, TokenEvent(request_id="x", token_ids=(2,)))
    ledger._begin()
    ledger.heard(record, 0, TokenEvent(request_id="x", token_ids=(3,)))
    ledger.flush()
    step(ledger, other, 7)
    base_written(ledger)
    killed(ledger)
    again = ledger_at(state)
    assert tokens_of(again.find(ALICE, b"digest")) == (1, 2, 3) and tokens_of(again.find(BOB, b"digest")) == (7,)
    assert not any(record.interrupted for record in again.unfinished()) and len(again.unfinished()) == 2
    again.close()
