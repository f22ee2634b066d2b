"""What the ledger costs, and what a flipped bit costs it: the product's own files, or SQLite in their place.

    python bench/ledger.py --store files
    python bench/ledger.py --store sqlite --folder /somewhere/on/the/disk

Prints the time that the event loop spends on a step's tokens (most of it waiting for the write, as it does while the
disk is quick), the bytes given to the kernel per 1000 tokens, the time to read 10,000 answers back, and what remains of
the calls when one bit of the folder, as a kill leaves it, is flipped.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sqlite3
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from cluster.engine.request import FinishReason, Request, SamplingParams, TokenEvent
from cluster.frontend.ledger import request_ledger
from cluster.frontend.ledger.ledger_records import Progress, Record
from cluster.frontend.ledger.request_ledger import Ledger, LedgerConfig

log = logging.getLogger(__name__)
ROOMY = LedgerConfig(retain_bytes=1 << 30, retain_seconds=1e6)
WHOLE, CUT, LOST = "as it was", "cut, computed on", "forgotten"
PAGE_BYTES = 1024
"""A step's records rewrite the page they end on, so small ones write less; 4096 is SQLite's own choice."""


class SqliteFolder:
    """What `Ledger` needs of `LedgerFolder`, over SQLite in WAL mode: a table of records with a CRC-32 each.

    A write is a transaction, a new base replaces all rows in one. What cannot be read as a table is read row by row.
    After `checkpoint_every` writes (0: when SQLite itself does, after 1000 pages) its own log is brought into the table
    and emptied: damage in it costs all that follows there.
    """

    checkpoint_every, synchronous = 0, "NORMAL"

    def __init__(self, folder: Path, segment_bytes: int, fsync: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._segment_bytes, self._written, self._base_bytes = segment_bytes, 0, 0
        self._db = sqlite3.connect(folder / "ledger.sqlite", check_same_thread=False, isolation_level=None)
        for pragma in (
            f"page_size={PAGE_BYTES}", "journal_mode=WAL", f"synchronous={'FULL' if fsync else self.synchronous}",
            "secure_delete=ON",
        ):  # fmt: skip
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE IF NOT EXISTS record (id INTEGER PRIMARY KEY, crc INTEGER, payload BLOB)")
        self.failures = 0
        self._retry_at, self._writes = 0.0, 0
        self.writes_base = False

    def read(self) -> Iterator[bytes]:
        """All payloads that count, oldest first; what is damaged is said and left out."""
        try:
            rows = self._db.execute("SELECT id, crc, payload FROM record ORDER BY id").fetchall()
        except sqlite3.DatabaseError as error:
            log.error("damaged: %s", error)
            rows = list(self._one_by_one())
        for number, crc, payload in rows:
            if isinstance(payload, bytes) and zlib.crc32(payload) == crc:
                yield payload
            else:
                log.error("record %s is damaged", number)

    def _one_by_one(self) -> Iterator[tuple[int, int, bytes]]:
        number, bad = 0, 0
        while bad < 5000:
            number += 1
            try:
                row = self._db.execute("SELECT id, crc, payload FROM record WHERE id = ?", (number,)).fetchone()
            except sqlite3.DatabaseError:
                row = None
            bad = bad + 1 if row is None else 0
            if row is not None:
                yield row

    @property
    def wants_base(self) -> bool:
        return time.monotonic() >= self._retry_at and self._written >= max(self._segment_bytes, self._base_bytes)

    def append(self, payloads: Sequence[bytes]) -> None:
        self._transact(payloads, "")

    def begin(self, base: Callable[[], Iterable[bytes]]) -> None:
        payloads = list(base())
        self._transact(payloads, "DELETE FROM record")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._written, self._base_bytes = 0, sum(map(len, payloads))

    def _transact(self, payloads: Sequence[bytes], first: str) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            if first:
                self._db.execute(first)
            rows = [(zlib.crc32(payload), payload) for payload in payloads]
            self._db.executemany("INSERT INTO record (crc, payload) VALUES (?, ?)", rows)
            self._db.execute("COMMIT")
            self._written += sum(map(len, payloads))
            self._writes += 1
            if self.checkpoint_every and self._writes % self.checkpoint_every == 0:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as error:
            self.failures, self._retry_at = self.failures + 1, time.monotonic() + 30.0
            log.error("cannot be written: %s", error)
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def close(self, timeout: float | None = None) -> None:
        self._db.close()


def begun(ledger: Ledger, name: str, prompt_tokens: int = 50) -> Record:
    asked = Request(request_id=name, token_ids=tuple(range(prompt_tokens)), sampling=SamplingParams(seed=7))
    record = ledger.admit(("caller", name), name.encode(), [asked], shown=1)
    record.open_prompts = 1
    return record


def step(ledger: Ledger, records: list[Record], rng: random.Random, end: bool = False) -> None:
    reason = FinishReason.LENGTH if end else None
    for record in records:
        token = rng.randrange(50_000)
        ledger.heard(record, 0, TokenEvent(request_id="x", token_ids=(token,), finish_reason=reason))
    ledger.flush()


def bytes_written() -> int:
    """By this process so far, to whatever file."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


def steps(folder: Path, streams: int, count: int) -> None:
    ledger, rng, times = Ledger(folder, "bench", ROOMY), random.Random(0), []
    records = [begun(ledger, str(i)) for i in range(streams)]
    time.sleep(0.2)
    before = bytes_written()
    for _ in range(count):
        began = time.perf_counter()
        step(ledger, records, rng)
        times.append(1e6 * (time.perf_counter() - began))
    tokens = count * streams
    times.sort()
    print(
        f"{streams:3d} streams: event loop {statistics.median(times) / streams:.1f} us a token, "
        f"{statistics.median(times):.0f} us a step ({times[len(times) * 99 // 100]:.0f} of one in a hundred); "
        f"{(bytes_written() - before) / tokens:.0f} KB per 1000 tokens; "
        f"{sum(f.stat().st_size for f in folder.iterdir()) >> 10} KiB on the disk"
    )
    ledger.close()


def read_back(folder: Path, answers: int, tokens: int) -> None:
    ledger, rng = Ledger(folder, "bench", ROOMY), random.Random(0)
    for start in range(0, answers, 100):
        records = [begun(ledger, str(i)) for i in range(start, start + 100)]
        for token in range(tokens):
            step(ledger, records, rng, end=token == tokens - 1)
        for record in records:
            ledger.prompt_over(record, complete=True)
    ledger.close()
    began = time.perf_counter()
    again = Ledger(folder, "bench", ROOMY)
    assert len(again) == answers
    print(f"{answers} answers of {tokens} tokens read back in {time.perf_counter() - began:.2f} s")
    again.close()


def states(ledger: Ledger, known: dict[str, tuple[bool, list[int]]]) -> dict[str, str]:
    """What became of each call, by its name."""
    found = {}
    for name, (ended, tokens) in known.items():
        record = ledger.find(("caller", name), name.encode())
        if record is None:
            found[name] = LOST
            continue
        got = [token for event in record.unpacked().events(0) for token in event.token_ids]
        assert got == tokens[: len(got)], "a wrong token"
        over = record.progress is Progress.ENDED
        found[name] = WHOLE if got == tokens and over == ended else CUT
    return found


def flips(folder: Path, trials: int) -> None:
    """Of folders as kills at four moments leave them."""
    ledger, rng = Ledger(folder / "state", "bench", ROOMY), random.Random(0)
    known: dict[str, tuple[bool, list[int]]] = {}
    hurt, forgotten, silent = [], [], 0
    said = Counting()
    logging.getLogger().addHandler(said)
    for start in range(0, 400, 20):
        records = [begun(ledger, str(i)) for i in range(start, start + 20)]
        for token in range(40):
            step(ledger, records[token % 2 :: 2], rng, end=token >= 38)
        for record in records:
            heard = [token for event in record.unpacked().events(0) for token in event.token_ids]
            known[record.key[1]] = (start % 50 != 0, heard)
            if start % 50:
                ledger.prompt_over(record, complete=True)
        if start % 50:
            continue
        time.sleep(0.3)
        killed = folder / f"killed-{start}"
        shutil.copytree(folder / "state", killed, ignore=shutil.ignore_patterns("*-shm", "*.part"))
        for _ in range(trials // 4):
            found = after_a_flip(killed, known, said, rng)
            hurt.append(sum(state != WHOLE for state in found.values()))
            forgotten.append(sum(state == LOST for state in found.values()))
            silent += bool(hurt[-1] and not said.errors)
    ledger.close()
    print(
        f"{len(hurt)} flips of one bit, of up to 320 calls: {statistics.mean(hurt):.1f} hurt on average "
        f"({max(hurt)} at most), {statistics.mean(forgotten):.1f} forgotten ({max(forgotten)} at most); "
        f"{silent} times in silence"
    )


def after_a_flip(
    killed: Path, known: dict[str, tuple[bool, list[int]]], said: Counting, rng: random.Random
) -> dict[str, str]:
    copy = killed.with_name("copy")
    shutil.copytree(killed, copy)
    flip(copy, rng)
    said.errors = 0
    try:
        again = Ledger(copy, "bench", ROOMY)
    except sqlite3.Error:  # the file would be set aside
        said.errors, found = 1, dict.fromkeys(known, LOST)
    else:
        found = states(again, known)
        again.close()
    shutil.rmtree(copy)
    return found


class Counting(logging.Handler):
    """Whether damage was said."""

    errors = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.errors += record.levelno >= logging.ERROR


def flip(folder: Path, rng: random.Random) -> None:
    """One bit of all the bytes there are."""
    files = sorted(path for path in folder.iterdir() if path.name != "lock" and path.stat().st_size)
    path = rng.choices(files, [each.stat().st_size for each in files])[0]
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("files", "sqlite"), default="files")
    parser.add_argument("--checkpoint-every", type=int, default=0, help="writes, of SQLite's log into its table")
    parser.add_argument("--synchronous", default="NORMAL", help="of SQLite")
    parser.add_argument("--folder", default=None, help="on the disk to measure (default: a temporary one)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--flips", type=int, default=200)
    given = parser.parse_args()
    SqliteFolder.checkpoint_every, SqliteFolder.synchronous = given.checkpoint_every, given.synchronous
    if given.store == "sqlite":
        request_ledger.LedgerFolder = SqliteFolder  # type: ignore[assignment, misc]
    logging.basicConfig(level=logging.ERROR, handlers=[logging.NullHandler()])
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        measures: list[Callable[[Path], None]] = [
            lambda folder: steps(folder, 1, given.steps),
            lambda folder: steps(folder, 16, given.steps),
            lambda folder: steps(folder, 64, given.steps),
            lambda folder: read_back(folder, given.answers, 100),
            lambda folder: flips(folder, given.flips),
        ]
        for number, measure in enumerate(measures):
            (folder := Path(made) / str(number)).mkdir(mode=0o700)
            measure(folder)


if __name__ == "__main__":
    main()
