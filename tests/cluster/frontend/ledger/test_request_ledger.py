"""The ledger by itself: what was written is known again after a kill at any byte, damage costs no more than what was
damaged, and neither memory nor disk grows without end."""

from __future__ import annotations

import errno
import os
import pickle
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.engine.request import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs
from cluster.frontend.ledger import ledger_files, ledger_writer
from cluster.frontend.ledger.ledger_files import MAGIC, framed
from cluster.frontend.ledger.ledger_records import Origin, Progress, Record, digest_of, dumps
from cluster.frontend.ledger.request_ledger import Ledger, LedgerConfig
from cluster.request_errors import RequestIdReused
from parallel.errors import ConfigError
from tests.cluster.frontend.harness import call

ALICE, BOB = ("alice", "one"), ("bob", "one")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine's disk is not a slow one."""
    monkeypatch.setattr(ledger_writer, "PATIENCE_S", 60.0)


def ledger_at(folder: Path, origin: str = "model", clock: Callable[[], float] | None = None, **config: float) -> Ledger:
    made = LedgerConfig(**config)  # type: ignore[arg-type]
    return Ledger(folder, origin, made) if clock is None else Ledger(folder, origin, made, clock)


def begun(ledger: Ledger, key: tuple[str, str] = ALICE, prompts: int = 1) -> Record:
    asked = [Request(request_id=key[1], token_ids=(1, 2), sampling=SamplingParams(seed=3)) for _ in range(prompts)]
    record = ledger.admit(key, b"digest", asked, shown=1)
    record.open_prompts = prompts
    return record


def step(ledger: Ledger, record: Record, *tokens: int, end: bool = False, prompt: int = 0) -> None:
    reason = FinishReason.LENGTH if end else None
    logprobs = tuple(TokenLogprobs(token, -1.5) for token in tokens)
    ledger.heard(record, prompt, TokenEvent(request_id="x", token_ids=tokens, logprobs=logprobs, finish_reason=reason))
    ledger.flush()


def tokens_of(record: Record | None, prompt: int = 0) -> tuple[int, ...]:
    assert record is not None, "it was forgotten"
    return tuple(token for event in record.unpacked().events(prompt) for token in event.token_ids)


def killed(ledger: Ledger) -> None:
    """As after kill -9: nothing more is written, and the lock is free. What a thread writes is left to end."""
    ledger._items.clear()
    ledger.close()


def base_written(ledger: Ledger) -> None:
    writer = ledger.folder._base_writer
    assert writer is not None, "each ledger begins with a base"
    writer.join()


def last_log(folder: Path) -> Path:
    return max(folder.glob("*.log"))


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


def test_a_log_cut_at_any_byte_gives_a_beginning_of_what_was_heard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    first = ledger_at(state)
    record = begun(first)
    for token in range(12):
        step(first, record, token)
    killed(first)
    whole, path, seen = last_log(state).read_bytes(), last_log(state), set()
    for size in range(0, len(whole) + 1, 11):
        for file in (set(state.iterdir()) - {path, state / "lock"}) - set(state.glob(f"{path.stem}.base")):
            file.unlink()
        path.write_bytes(whole[:size])
        again = ledger_at(state)
        found = again.find(ALICE, b"digest")
        tokens = () if found is None else tokens_of(found)
        assert tokens == tuple(range(len(tokens)))
        seen.add(len(tokens))
        killed(again)
        path.write_bytes(whole)
        state.joinpath(f"{path.stem}.base").write_bytes(framed(dumps(Origin("model"))))
    assert {0, 5, 11} <= seen
    assert "damaged" not in caplog.text, "a torn end is what a kill leaves"


def test_damage_is_named_by_file_and_offset_and_costs_the_call_its_rest_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    first = ledger_at(state)
    hurt, well = begun(first), begun(first, BOB)
    for token in range(6):
        step(first, hurt, token)
        step(first, well, 10 + token)
    for record in (hurt, well):
        step(first, record, 99, end=True)
        first.prompt_over(record, complete=True)
    killed(first)
    data = bytearray(last_log(state).read_bytes())
    places = [i for i in range(len(data)) if data[i : i + 4] == MAGIC]
    at = places[2 + 2 * 3]  # two admissions, three steps of both: the fourth of the first
    data[at + 20] ^= 0xFF
    last_log(state).write_bytes(data)
    again = ledger_at(state)
    assert f"{last_log(state).parent}" in caplog.text and f"is damaged at offset {at}" in caplog.text
    found = again.find(ALICE, b"digest")
    assert tokens_of(found) == (0, 1, 2), "nothing after a gap"
    assert found is not None and found.progress is Progress.PARKED, "not an answer any more: a retry goes on"
    assert tokens_of(again.find(BOB, b"digest")) == (10, 11, 12, 13, 14, 15, 99)
    again.close()


def test_ids_belong_to_their_caller_and_to_what_was_asked(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path / "state")
    begun(ledger)
    assert ledger.find(ALICE, b"digest") is not None and ledger.find(BOB, b"digest") is None
    with pytest.raises(RequestIdReused, match="request_id 'one' was used for a call that asked something else"):
        ledger.find(ALICE, b"other")
    ledger.close()


def test_the_digest_is_of_what_decides_on_the_answer() -> None:
    bias = {5: 1.0, 3: 2.0}
    one = call([1, 2], sampling=SamplingParams(seed=1, logit_bias=bias), request_id="a", deadline=3.0, priority=1)
    same = call([1, 2], sampling=SamplingParams(seed=1, logit_bias=dict(reversed(bias.items()))), request_id="b")
    assert digest_of(one) == digest_of(same)
    assert len({digest_of(c) for c in (one, call([1, 2]), call([1]), call("ab"), call([1, 2], score=True))}) == 5


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


def test_two_servers_never_share_a_folder_and_nobody_else_reads_it(tmp_path: Path) -> None:
    state = tmp_path / "deep" / "state"
    ledger = ledger_at(state)
    base_written(ledger)  # a draft would be renamed under our eyes
    with pytest.raises(ConfigError, match=rf"state is in use by another server \(process {os.getpid()}\)"):
        ledger_at(state)
    assert state.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in state.iterdir())
    ledger.close()
    state.chmod(0o755)
    with pytest.raises(ConfigError, match="can be entered by others"):
        ledger_at(state)


def test_a_full_disk_is_said_once_and_written_down_when_there_is_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = ledger_at(tmp_path / "state")
    base_written(ledger)
    record = begun(ledger)
    real, full = ledger_files._write_all, [True]

    def write(file: int, data: bytes) -> None:
        if full[0]:
            os.write(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, data)

    monkeypatch.setattr(ledger_files, "_write_all", write)
    for token in range(5):
        step(ledger, record, token)
    assert caplog.text.count("cannot be written") == 1 and ledger.folder.failures == 1
    monkeypatch.setattr(ledger_files, "RETRY_S", 0.0)
    ledger.folder._retry_at = 0.0
    full[0] = False
    step(ledger, record, 5)
    step(ledger, record, 6)
    killed(ledger)
    again = ledger_at(tmp_path / "state")
    assert tokens_of(again.find(ALICE, b"digest")) == (0, 1, 2, 3, 4, 5, 6)
    again.close()


def test_a_record_makes_nothing_but_what_a_ledger_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = ledger_at(tmp_path / "state")
    killed(ledger)
    planted = tmp_path / "planted"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(planted),)

    with last_log(tmp_path / "state").open("ab") as file:
        file.write(framed(b"R" + pickle.dumps(Evil())))
    ledger_at(tmp_path / "state").close()
    assert not planted.exists() and "1 records of the ledger are left out" in caplog.text


def test_a_slow_disk_holds_no_stream_up_is_said_and_has_everything_once_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_writer, "PATIENCE_S", 0.05)
    ledger = ledger_at(tmp_path / "state")
    record, gate, real = begun(ledger), threading.Event(), ledger_files._write_all

    def slow(file: int, data: bytes) -> None:
        assert gate.wait(60)
        real(file, data)

    monkeypatch.setattr(ledger_files, "_write_all", slow)
    began = time.monotonic()
    for token in range(200):
        step(ledger, record, token)
    assert time.monotonic() - began < 30, "each waited for its write"
    writer = ledger.writer
    assert writer.behind_seconds > 0 and writer.behind_bytes > 0 and caplog.text.count("takes longer") == 1
    gate.set()
    ledger.close()
    assert tokens_of(ledger_at(tmp_path / "state").find(ALICE, b"digest")) == tuple(range(200))
    assert "has caught up" in caplog.text


def test_what_waits_for_a_disk_is_bounded_and_then_everything_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_writer, "PATIENCE_S", 0.01)
    monkeypatch.setattr(ledger_writer, "MOST_BEHIND_BYTES", 4096)
    ledger = ledger_at(tmp_path / "state")
    record, gate, real = begun(ledger), threading.Event(), ledger_files._write_all
    monkeypatch.setattr(ledger_files, "_write_all", lambda file, data: gate.wait(60) and real(file, data))
    for token in range(400):
        step(ledger, record, token)
    assert ledger.writer.behind_bytes <= 4096 and ledger.folder.failures == 1
    gate.set()
    end = time.monotonic() + 60
    while ledger.writer.behind_bytes and time.monotonic() < end:
        time.sleep(0.01)
    monkeypatch.setattr(ledger_writer, "PATIENCE_S", 60.0)
    step(ledger, record, 400)  # with it a new base
    step(ledger, record, 401)
    ledger.close()
    assert tokens_of(ledger_at(tmp_path / "state").find(ALICE, b"digest")) == tuple(range(402))


def test_what_no_disk_should_do_ends_the_remembering_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_at(tmp_path / "state")
    record = begun(ledger)
    monkeypatch.setattr(ledger_files, "_write_all", lambda file, data: 1 // 0)
    for token in range(3):
        step(ledger, record, token)
    assert ledger.folder.failures in (1, 2) and tokens_of(record) == (0, 1, 2)  # a second write may be under way
    ledger.close()


def ended_call(ledger: Ledger, key: tuple[str, str], tokens: int) -> None:
    record = begun(ledger, key)
    step(ledger, record, *range(tokens), end=True)
    ledger.prompt_over(record, complete=True)


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
