"""A disk that is slow, never answers or does what no disk should holds no stream up, and is said."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from cluster.frontend.ledger import ledger_files, ledger_writer
from tests.cluster.frontend.ledger.ledgers import ALICE, begun, ledger_at, step, tokens_of


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


def test_what_waited_for_a_disk_goes_down_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_writer, "PATIENCE_S", 0.01)
    ledger = ledger_at(tmp_path / "state")
    record, gate, real, writes = begun(ledger), threading.Event(), ledger_files._write_all, []

    def slow(file: int, data: bytes) -> None:
        writes.append(len(data))
        assert gate.wait(60)
        real(file, data)

    monkeypatch.setattr(ledger_files, "_write_all", slow)
    for token in range(50):
        step(ledger, record, token)
    gate.set()
    ledger.close()
    assert len(writes) == 2 and writes[1] > 40 * writes[0]
