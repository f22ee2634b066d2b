"""One copy of a checkpoint's files per host, on its own disk, for storage that every process would ask for all of them.

    source --each byte once, by whoever has the file's lock--> FOLDER/name-hash/file <--mapped by every process

Processes that load the same checkpoint share the work file by file; one that dies leaves its file to the next, one that
hangs is waited for no longer than `stall_s`, and where no copy can be made the source is read. A copy is good for as
long as size and time of its source are the same, and its checksum is compared once after every boot. Downloads nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel.errors import CheckpointError
from parallel.private_folder import own_folder

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
"""Told what is going on, and how many bytes of how many are done."""
CHUNK = 8 << 20
SPARE = 1 << 30
"""Bytes of the disk that a copy leaves free."""
POLL_S = 0.1
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True)
class Note:
    """What a finished copy was made of, its checksum, and when that was last compared."""

    size: int
    modified: int  # of the source, in ns
    crc32: int
    boot: str = ""
    changed: int = 0  # of the copy, in ns

    @staticmethod
    def read(path: Path) -> Note | None:
        try:
            return Note(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None  # none yet, or of another version: the copy is made again


class WeightsCache:
    """A folder of copies. `fetched` counts the bytes that this process read from sources."""

    def __init__(self, folder: Path, progress: Progress | None = None, stall_s: float = 60.0) -> None:
        self.folder, self.stall_s = folder, stall_s
        self.fetched = 0
        self._progress = progress or (lambda what, done, total: None)

    def local(self, paths: Sequence[Path]) -> dict[Path, Path]:
        """Where to read each of one folder's files: its copy, made now by this process or another; or itself."""
        home = self._home(paths[0].parent.resolve())  # the files themselves may be links, into one folder for all
        copies = {path: _Copy(path, home / path.name) for path in paths}
        try:
            own_folder(home)
            _tidy(home, {path.name for path in paths})
            waiting = [copy for copy in copies.values() if not copy.is_whole()]
            _check_room(home, waiting)
            self._await(waiting, list(copies.values()))
        except OSError as error:
            log.warning("no copies of all weights in %s, they are read from their source: %s", home, error)
        return {path: copy.target if copy.is_whole() else path for path, copy in copies.items()}

    def _home(self, source: Path) -> Path:
        digest = hashlib.sha256(str(source).encode()).hexdigest()[:12]
        return self.folder / f"{source.name}-{digest}"

    def _await(self, waiting: list[_Copy], every: Sequence[_Copy]) -> None:
        """Until every copy is there: makes those that no other process is making, and waits for the others."""
        seen, since = (-1, 0), time.monotonic()
        while waiting:
            for copy in waiting:
                with copy.lock() as mine:
                    if mine and not copy.is_whole() and not copy.confirm():
                        self._make(copy, every)
            waiting = [copy for copy in waiting if not copy.is_whole()]
            signs = self._tell(every), max(copy.sign_of_life for copy in every)
            if signs != seen:
                seen, since = signs, time.monotonic()
            elif waiting and time.monotonic() - since > self.stall_s:
                late = ", ".join(copy.target.name for copy in waiting)
                raise TimeoutError(f"another process copies {late} and got no further within {self.stall_s:g} s")
            elif waiting:
                time.sleep(POLL_S)

    def _make(self, copy: _Copy, every: Sequence[_Copy]) -> None:
        """Reads the source once, from its first byte to its last."""
        before, crc = copy.source.stat(), 0
        copy.target.unlink(missing_ok=True)  # of an older source: its room is needed
        try:
            with copy.source.open("rb", buffering=0) as source, copy.draft.open("wb", buffering=0) as draft:
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                for chunk in _chunks(source.fileno()):
                    self.fetched += len(chunk)
                    crc = zlib.crc32(chunk, crc)
                    draft.write(chunk)
                    copy.give_sign_of_life()
                    self._tell(every)
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the copy's pages are enough
                written = draft.tell()
            after = copy.source.stat()
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns) or written != after.st_size:
                raise CheckpointError(f"{copy.source} changed while it was copied; start again when it is complete")
            copy.finish(Note(size=written, modified=after.st_mtime_ns, crc32=crc))
        except BaseException:
            copy.draft.unlink(missing_ok=True)
            raise

    def _tell(self, every: Sequence[_Copy]) -> int:
        """How much lies here, whoever brought it."""
        done, total = sum(min(copy.present, copy.size) for copy in every), sum(copy.size for copy in every)
        self._progress("copying weights to this host", done, total)
        return done


class _Copy:
    """One file, its copy, and what lies beside the copy: a draft, a note, a lock."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self.draft, self._note, self._lock = (
            target.with_name(f"{target.name}.{kind}") for kind in ("part", "note", "lock")
        )
        stat = source.stat()
        self.size, self._modified = stat.st_size, stat.st_mtime_ns

    @property
    def present(self) -> int:
        """Bytes of it that are here."""
        for path in (self.draft, self.target):
            try:
                return path.stat().st_size
            except FileNotFoundError:
                continue
        return 0

    @property
    def sign_of_life(self) -> int:
        """Changes as long as some process is at work on it."""
        try:
            return self._lock.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def give_sign_of_life(self) -> None:
        os.utime(self._lock)

    def is_whole(self) -> bool:
        """Whether the copy is the source's, and nothing can have happened to it since that was checked."""
        note = self._good_note()
        return note is not None and note.boot == boot() and note.changed == self.target.stat().st_ctime_ns

    def confirm(self) -> bool:
        """The same for a copy from before the last boot, which is read and compared; holding the lock."""
        note = self._good_note()
        if note is None:
            return False
        with self.target.open("rb", buffering=0) as file:
            crc = 0
            for chunk in _chunks(file.fileno()):
                crc = zlib.crc32(chunk, crc)
                self.give_sign_of_life()
        if crc != note.crc32:
            log.warning("%s is not what was written there: its checksum differs; it is copied again", self.target)
            return False
        self._write(note)
        return True

    def finish(self, note: Note) -> None:
        """The draft becomes the copy. Whoever has an older one mapped keeps that."""
        os.replace(self.draft, self.target)
        self._write(note)

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Whether this process may make the copy; the lock ends with its process, however that ends."""
        fd = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            yield _locked(fd)
        finally:
            os.close(fd)

    def _good_note(self) -> Note | None:
        """The note, where source and copy have the size and time that it says."""
        note = Note.read(self._note)
        if note is None or (note.size, note.modified) != (self.size, self._modified):
            return None
        return note if self.target.is_file() and self.target.stat().st_size == note.size else None

    def _write(self, note: Note) -> None:
        changed = self.target.stat().st_ctime_ns
        draft = self._note.with_suffix(".new")
        draft.write_text(json.dumps(asdict(note) | {"boot": boot(), "changed": changed}), encoding="utf-8")
        os.replace(draft, self._note)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def boot() -> str:
    """Names the time since the machine was started; empty where that cannot be known."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _chunks(fd: int) -> Iterator[memoryview]:
    """A file's bytes from where it stands, in one buffer that is used again."""
    buffer = memoryview(bytearray(CHUNK))
    while count := os.readv(fd, [buffer]):
        yield buffer[:count]


def _check_room(home: Path, copies: Sequence[_Copy]) -> None:
    """An error where the disk cannot take what is still to come."""
    disk = os.statvfs(home)
    free = disk.f_bavail * disk.f_frsize
    needed = sum(max(0, copy.size - copy.present) for copy in copies)
    if needed and needed + SPARE > free:
        raise OSError(f"{needed / 1e9:.1f} GB and {SPARE / 1e9:.1f} to spare are needed, {free / 1e9:.1f} GB are free")


def _tidy(home: Path, names: set[str]) -> None:
    """Removes copies of files that the source has no more."""
    for path in home.iterdir():
        if not any(path.name == name or path.name.startswith(f"{name}.") for name in names):
            path.unlink(missing_ok=True)
