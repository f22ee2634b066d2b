"""The ledger's folder: records appended to a log, and now and then everything that still counts written to a new base.

    000007.base    what counted when 000007.log was begun; written beside the work, complete once it has this name
    000007.log     what happened since: [magic, length, CRC-32][payload] after another

A log's last record may be torn by a kill; damage elsewhere is named by file and offset, and reading goes on at the next
record that is whole. A write that fails is said once, and tried again later with a new base. Knows no record's meaning.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from cluster.supervision import supervised
from parallel.errors import ConfigError
from parallel.private_folder import own_folder

log = logging.getLogger(__name__)
MAGIC = b"\xa7tpL"
HEAD = struct.Struct("<4sII")
RETRY_S = 30.0
"""How long after a write that failed the next one is tried."""


def framed(payload: bytes) -> bytes:
    return HEAD.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload


def read_payloads(path: Path, torn: bool = False) -> Iterator[bytes]:
    """Every whole record of a file; what is not whole is reported, unless it is the `torn` end of the last log."""
    try:
        data = path.read_bytes()
    except OSError as error:
        log.error("%s cannot be read (%s): it is left out", path, error)
        return
    at = whole = 0  # all before `whole` was read
    while 0 <= at < len(data):
        payload = _whole(data, at)
        if payload is None:
            at = data.find(MAGIC, at + 1)
            continue
        _report(path, whole, at)
        yield payload
        at = whole = at + HEAD.size + len(payload)
    if not torn:
        _report(path, whole, len(data))


def _whole(data: bytes, at: int) -> bytes | None:
    if len(data) - at < HEAD.size:
        return None
    magic, length, crc = HEAD.unpack_from(data, at)
    payload = data[at + HEAD.size : at + HEAD.size + length]
    return payload if magic == MAGIC and len(payload) == length and zlib.crc32(payload) == crc else None


def _report(path: Path, start: int, end: int) -> None:
    if start < end:
        log.error("%s is damaged at offset %d: %d bytes are left out", path, start, end - start)


class LedgerFolder:
    """A folder of one server at a time that nobody else can read. Used from one thread; another writes the bases."""

    def __init__(self, folder: Path, segment_bytes: int, fsync: bool = False) -> None:
        self._folder, self._segment_bytes, self._fsync = folder, segment_bytes, fsync
        self._lock = _claim(folder)
        self._log: int | None = None
        self._index = max(self._numbers("*"), default=0)
        self._written = self._base_bytes = 0
        self._retry_at: float | None = None
        self._base_writer: threading.Thread | None = None
        self.failures = 0
        """Writes that failed."""

    def read(self) -> Iterator[bytes]:
        """All payloads that count, oldest first."""
        bases = self._numbers("base")
        for number in bases[-1:]:
            yield from read_payloads(self._path(number, "base"))
        logs = [number for number in self._numbers("log") if number >= max(bases, default=0)]
        for number in logs:
            yield from read_payloads(self._path(number, "log"), torn=number == logs[-1])

    @property
    def writes_base(self) -> bool:
        """Whether one is being written."""
        return self._base_writer is not None and self._base_writer.is_alive()

    @property
    def wants_base(self) -> bool:
        """Whether the log has grown so long that what counts should be written anew; also after a failure, at times."""
        if self.writes_base:
            return False
        if self._log is None:
            return self._retry_at is None or time.monotonic() >= self._retry_at
        return self._written >= max(self._segment_bytes, self._base_bytes)

    def append(self, payloads: Sequence[bytes]) -> None:
        """One write. A failure is counted; nothing more is written until there is a new base."""
        if self._log is None:
            return
        data = b"".join(map(framed, payloads))
        try:
            _write_all(self._log, data)
            if self._fsync:
                os.fsync(self._log)
            self._written += len(data)
        except OSError as error:
            self._fail(error)

    def begin(self, base: Callable[[], Iterable[bytes]]) -> None:
        """A new log. `base` gives what counts at this moment, and is called in a thread of its own."""
        self._close_log()
        self._index, self._written = self._index + 1, 0
        try:
            self._log = _open(self._path(self._index, "log"), os.O_WRONLY | os.O_TRUNC)
        except OSError as error:
            self._fail(error)
            return
        path = self._path(self._index, "base")
        write, failed = partial(self._write_base, path, base), partial(self._base_failed, path)
        self._base_writer = supervised("ledger-base", write, failed)

    def close(self, timeout: float | None = None) -> None:
        """Waits for a base that is being written, and lets the next server in."""
        if self._base_writer is not None:
            self._base_writer.join(timeout)
        self._close_log()
        os.close(self._lock)

    def _write_base(self, path: Path, base: Callable[[], Iterable[bytes]]) -> None:
        """Under its name once it is complete; then what came before it can go."""
        draft = path.with_suffix(".part")
        try:
            with open(draft, "wb", opener=_open) as file:
                self._base_bytes = sum(file.write(framed(payload)) for payload in base())
                if self._fsync:
                    file.flush()
                    os.fsync(file.fileno())
            draft.replace(path)
            for old in self._files("*"):
                if int(old.stem) < int(path.stem):
                    old.unlink()
        except OSError as error:
            self._base_failed(path, error)

    def _base_failed(self, path: Path, error: Exception) -> None:
        self.failures += 1
        log.error("%s could not be written (%s); what came before it is kept", path, error)

    def _fail(self, error: OSError) -> None:
        self.failures += 1
        if self._retry_at is None:
            log.error("the ledger in %s cannot be written (%s); answers go on without it", self._folder, error)
        self._retry_at = time.monotonic() + RETRY_S
        self._close_log()

    def _close_log(self) -> None:
        if self._log is not None:
            os.close(self._log)
            self._log = None

    def _files(self, suffix: str) -> list[Path]:
        return [path for path in self._folder.glob(f"*.{suffix}") if path.stem.isdecimal()]

    def _numbers(self, suffix: str) -> list[int]:
        return sorted(int(path.stem) for path in self._files(suffix))

    def _path(self, number: int, suffix: str) -> Path:
        return self._folder / f"{number:06d}.{suffix}"


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _open(path: Path | str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _claim(folder: Path) -> int:
    """Its lock, held until it is closed or this process ends in whatever way."""
    if folder.is_dir() and (mode := folder.stat().st_mode) & 0o077:  # closing it would break whoever opened it
        raise ConfigError(
            f"server.state_dir {folder} can be entered by others (mode {mode & 0o777:o}); it holds prompts, "
            "answers and a key: give a folder of your own, of mode 700"
        )
    try:
        own_folder(folder)
    except OSError as error:
        raise ConfigError(f"server.state_dir {folder} will not do: {error}; give a folder of your own") from error
    file = _open(folder / "lock", os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(file, 32).decode(errors="replace").strip()
        os.close(file)
        raise ConfigError(
            f"server.state_dir {folder} is in use by another server (process {holder or 'unknown'}); give each its own"
        ) from error
    os.ftruncate(file, 0)
    os.write(file, str(os.getpid()).encode())
    return file
