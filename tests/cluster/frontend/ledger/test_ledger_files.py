"""A kill at any byte, a flipped bit anywhere, others' files, a full disk: what was damaged is lost, nothing else."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest

from cluster.frontend.ledger import ledger_files
from cluster.frontend.ledger.ledger_files import MAGIC, framed
from cluster.frontend.ledger.ledger_records import Origin, Progress, dumps
from parallel.errors import ConfigError
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


def test_a_flipped_bit_anywhere_costs_the_calls_of_one_record_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, copy, rng = tmp_path / "state", tmp_path / "copy", random.Random(5)
    first = ledger_at(state)
    keys = [("alice", str(number)) for number in range(20)]
    for key in keys[:10]:
        ended_call(first, key, 5)
    killed(first)
    second = ledger_at(state)  # the ten are in its base
    for key in keys[10:]:
        ended_call(second, key, 5)
    base_written(second)
    killed(second)
    for _ in range(60):
        shutil.copytree(state, copy)
        files = [path for path in sorted(copy.iterdir()) if path.name != "lock"]
        path = rng.choices(files, [each.stat().st_size for each in files])[0]
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        caplog.clear()
        again = ledger_at(copy)
        found = [again.find(key, b"digest") for key in keys]
        whole = [record for record in found if record is not None and record.progress is Progress.ENDED]
        assert len(whole) >= len(keys) - 1 and all(tokens_of(record) == tuple(range(5)) for record in whole)
        last = path.suffix == ".log" and found[-1] is not None and found[-1].progress is Progress.RUNNING
        assert "is damaged at offset" in caplog.text or last, "the last record of all may be a kill's"
        again.close()
        shutil.rmtree(copy)


def test_what_an_earlier_version_wrote_is_left_out_and_goes_from_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    facts = (1, ALICE, b"digest", 1.0, "ended", 2.0, 0, pickle.dumps(((), 1, {})))
    records = [b"O" + pickle.dumps("model"), b"R" + pickle.dumps(facts)]
    (state / "000003.base").write_bytes(b"".join(map(framed, records)))
    (state / "000003.log").write_bytes(framed(b"D" + pickle.dumps(1)))
    ledger = ledger_at(state)
    assert len(ledger) == 0 and caplog.text.count("3 records of the ledger are left out") == 1
    base_written(ledger)
    ended_call(ledger, ALICE, 3)
    ledger.close()
    assert not list(state.glob("000003.*"))
    again = ledger_at(state)
    assert tokens_of(again.find(ALICE, b"digest")) == (0, 1, 2)
    again.close()


def test_files_that_are_no_ledger_s_are_named_and_the_server_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    ledger = ledger_at(state)
    ended_call(ledger, ALICE, 3)
    ledger.close()
    (state / "000007.log").write_bytes(os.urandom(1000))
    (state / "000008.log").mkdir()
    (state / "000009.log").write_bytes(b"")
    again = ledger_at(state)
    assert tokens_of(again.find(ALICE, b"digest")) == (0, 1, 2)
    assert "000007.log is damaged at offset 0: 1000 bytes are left out" in caplog.text
    assert "000008.log cannot be read" in caplog.text
    step(again, begun(again, BOB), 7)
    killed(again)
    third = ledger_at(state)
    assert tokens_of(third.find(BOB, b"digest")) == (7,)
    third.close()


def test_with_fsync_a_base_is_on_the_disk_before_what_it_replaces_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    ledger = ledger_at(tmp_path / "state", fsync=True)
    base_written(ledger)
    step(ledger, begun(ledger), 1)
    ledger.close()
    assert Path(synced[0]).name == "000001.part" and Path(synced[-1]).name == "000001.log"
