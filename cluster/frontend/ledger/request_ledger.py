"""What a server's own death must not lose: calls that came with a client's request_id, and what was answered.

Each call's requests, the engine's events and the ends are written down (ledger_files.py), so that after a restart open
calls go on, and a retry of the same (caller, request_id) gets the same answer from its first token. Answers are kept in
memory, too, within `retain_seconds` and `retain_bytes`. How events become text is the front-end's business: they are
replayed through the very code that took them the first time.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.engine.request import FinishReason, Request, TokenEvent
from cluster.frontend.ledger.ledger_files import LedgerFolder
from cluster.frontend.ledger.ledger_records import (
    NAMES,
    UNREADABLE,
    Content,
    Heard,
    Key,
    Progress,
    Record,
    dumps,
    loads,
    pack,
    take,
)
from cluster.frontend.ledger.ledger_writer import LedgerWriter
from cluster.frontend.requests.quarantine import Count
from cluster.request_errors import RequestIdReused
from parallel.errors import RequestError
from parallel.options import check_above_zero

log = logging.getLogger(__name__)
INTERRUPTED = (FinishReason.ABORTED, FinishReason.DEADLINE)
"""Ends that are no answer: a retry goes on from there."""


LOOKED_AT = 64
"""Of a caller's oldest records, to find one that is not short."""


@dataclass(frozen=True, kw_only=True)
class LedgerConfig:
    """How long and how much a server remembers of calls that came with a request_id."""

    retain_seconds: float = 600.0  # an answer, after its end
    retain_bytes: int = 64 << 20  # all answers; the oldest of whoever has the most go first
    rewrite_seconds: float = 60.0  # how long what is forgotten may stay on the disk
    segment_bytes: int = 8 << 20  # written before what counts is written anew
    orphan_seconds: float = 60.0  # after a restart a call without a reader is computed on for so long
    fsync: bool = False  # each write down to the disk: for hosts that lose power

    def __post_init__(self) -> None:
        names = ("retain_seconds", "retain_bytes", "rewrite_seconds", "segment_bytes", "orphan_seconds")
        check_above_zero("ledger", self, names)


class Ledger:
    """The records of one folder. `origin` names what gives the answers: records of another origin are left out."""

    def __init__(
        self, folder: Path, origin: str, config: LedgerConfig | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.config = config or LedgerConfig()
        self._origin, self._clock = origin, clock
        self._records: dict[Key, Record] = {}
        self._by_number: dict[int, Record] = {}
        self._retained: dict[int, Record] = {}  # oldest first
        self._retained_of: dict[str, dict[int, Record]] = {}  # the same, by caller
        self._bytes_of: Counter[str] = Counter()
        self._begun = -math.inf  # when the present base was
        self._forgotten = False  # whether there is something on the disk that counts no more
        self._last = 0
        self._closed = False
        self._items: list[tuple[int, int, int, int, Heard]] = []
        self.deaths: dict[bytes, Count] = {}
        """What was running when engines died, by content: quarantine.py's."""
        self._folder = LedgerFolder(folder, self.config.segment_bytes, self.config.fsync)
        self._writer = LedgerWriter(self._folder)
        self._recover()
        self._prune()
        self._begin()

    def __len__(self) -> int:
        return len(self._records)

    @property
    def retained_bytes(self) -> int:
        return self._bytes_of.total()

    def tidy(self) -> None:
        """To be called at times: what has expired leaves the memory, and the disk with the next base."""
        if self._closed:
            return
        self._prune()
        due = self._begun + self.config.rewrite_seconds
        if self._forgotten and not self._folder.writes_base and self._clock() >= due:
            self._begin()

    @property
    def failures(self) -> int:
        """Writes that failed since the start."""
        return self._folder.failures + self._writer.drops

    @property
    def behind_seconds(self) -> float:
        """How old the oldest write is that waits for the disk."""
        return self._writer.behind_seconds

    @property
    def behind_bytes(self) -> int:
        """What waits for the disk."""
        return self._writer.behind_bytes

    def find(self, key: Key, digest: bytes) -> Record | None:
        """The record of an earlier call of this caller and id, which must have asked the same."""
        self._prune()
        record = self._records.get(key)
        if record is not None and record.digest != digest:
            raise RequestIdReused(
                f"request_id {key[1]!r} was used for a call that asked something else; give each call its own"
            )
        return record

    def unfinished(self) -> list[Record]:
        """Those that the engine was at when the server before this one ended."""
        return [record for record in self._records.values() if record.progress is Progress.RUNNING]

    def admit(self, key: Key, digest: bytes, requests: Sequence[Request | RequestError], shown: int) -> Record:
        """A call that begins; written at once."""
        self._last += 1
        content = Content(requests=tuple(requests), shown=shown)
        record = Record(number=self._last, key=key, digest=digest, admitted=self._clock(), content=content)
        self._add(record)
        self._write(b"R" + dumps(record.facts()))
        return record

    def reopen(self, record: Record) -> None:
        """The engine is, or will be, at it again."""
        record.content, record.packed, record.interrupted = record.unpacked(), None, False
        self._unretain(record)
        self._note(record, Progress.RUNNING)

    def heard(self, record: Record, prompt_index: int, event: TokenEvent) -> None:
        """An event of the engine's; `flush` writes it."""
        values = {name: value for name, default in NAMES.items() if (value := getattr(event, name)) != default}
        if event.finish_reason in INTERRUPTED:
            record.interrupted = True
            values.pop("finish_reason"), values.pop("timings", None)
        if values:
            self._items.append((record.number, record.items, prompt_index, event.sample_index, values))
            take(record, prompt_index, event.sample_index, values)

    def flush(self) -> None:
        """One write for everything that was heard in a step."""
        if self._items:
            items, self._items = self._items, []
            self._write(b"S" + dumps(items))

    def prompt_over(self, record: Record, complete: bool) -> None:
        """A prompt has ended, `complete` if with its whole answer; with the last one the call is over."""
        record.interrupted |= not complete
        record.open_prompts -= 1
        if record.open_prompts <= 0 and record.content is not None and record.number in self._by_number:
            self.flush()
            record.orphan = None
            self._note(record, Progress.PARKED if record.interrupted else Progress.ENDED)
            self._retain(record)
            self._prune()

    def drop(self, record: Record) -> None:
        """Nothing of it is kept: a retry is a new call."""
        if self._by_number.pop(record.number, None) is not None:
            self._unretain(record)
            del self._records[record.key]
            self._forgotten = True
            self._write(b"D" + dumps(record.number))

    def note_deaths(self, key: bytes, count: Count | None) -> None:
        """Content that was running when an engine died, or (None) is no suspect any more; written at once."""
        self._write(_deaths(key, count))

    def close(self) -> None:
        self._closed = True
        self.flush()
        self._writer.close()

    # ------------------------------------------------------------ what is kept

    def _add(self, record: Record) -> None:
        if (old := self._records.get(record.key)) is not None:
            self._by_number.pop(old.number)
            self._unretain(old)
        self._records[record.key] = self._by_number[record.number] = record
        self._last = max(self._last, record.number)

    def _note(self, record: Record, progress: Progress) -> None:
        record.progress, record.over = progress, self._clock()
        self._write(b"E" + dumps((record.number, progress.value, record.over)))

    def _retain(self, record: Record) -> None:
        record.packed, record.content = record.packed or pack(record.unpacked()), None
        self._retained[record.number] = record
        self._retained_of.setdefault(record.key[0], {})[record.number] = record
        self._bytes_of[record.key[0]] += len(record.packed)

    def _unretain(self, record: Record) -> None:
        if (kept := self._retained.pop(record.number, None)) is not None:
            caller, own = kept.key[0], self._retained_of[kept.key[0]]
            del own[record.number]
            self._bytes_of[caller] -= len(kept.packed or b"")
            if not own:
                del self._retained_of[caller], self._bytes_of[caller]

    def _prune(self) -> None:
        """Forgets what is too old, then the oldest of whoever has the most while all is too much. Nothing is written of
        it: bases leave it out."""
        oldest = self._clock() - self.config.retain_seconds
        for record in list(self._retained.values()):
            if record.over >= oldest:
                break
            self._forget(record)
        while self.retained_bytes > self.config.retain_bytes:
            self._forget(self._superfluous(*self._bytes_of.most_common(1)[0]))

    def _superfluous(self, caller: str, nbytes: int) -> Record:
        """The oldest of a caller's records, but for short ones among them: long answers push out long ones first."""
        own = self._retained_of[caller]
        oldest = list(islice(own.values(), LOOKED_AT))
        return next((record for record in oldest if 2 * len(record.packed or b"") * len(own) >= nbytes), oldest[0])

    def _forget(self, record: Record) -> None:
        self._unretain(record)
        del self._by_number[record.number], self._records[record.key]
        self._forgotten = True

    # ------------------------------------------------------------ the folder

    def _write(self, payload: bytes) -> None:
        self._writer.append(payload)
        if self._writer.wants_base:
            self._begin()

    def _begin(self) -> None:
        self._begun, self._forgotten = self._clock(), False
        if self._items:  # they are in the base, too, but that may not be completed
            self._writer.append(b"S" + dumps(self._items))
            self._items = []
        facts = [record.facts() for record in self._records.values()]
        self._writer.begin(partial(_base, self._origin, facts, dict(self.deaths)))

    def _recover(self) -> None:
        """Everything that can be read. Of a record of which something is missing what comes later is left out, too."""
        ours = True
        for payload in self._folder.read():
            try:
                kind, value = payload[:1], loads(payload[1:])
                if kind == b"O":
                    ours = value == self._origin
                elif ours:
                    self._replay(kind, value)
            except UNREADABLE as error:
                log.error("a record of the ledger cannot be used (%s: %s)", type(error).__name__, error)
        for record in self._records.values():
            if record.progress is not Progress.RUNNING:
                self._retain(record)
        if self._records:
            log.warning("the ledger holds %d calls, %d of them open", len(self._records), len(self.unfinished()))

    def _replay(self, kind: bytes, value: Any) -> None:
        if kind == b"R":
            number, key, digest, admitted, progress, over, items, packed = value
            record = Record(number=number, key=tuple(key), digest=digest, admitted=admitted, packed=packed)
            record.progress, record.over, record.items = Progress(progress), over, items
            record.content, record.packed = record.unpacked(), None
            self._add(record)
        elif kind == b"S":
            for number, item, prompt_index, sample_index, values in value:
                known = self._by_number.get(number)
                if known is not None and known.items == item:
                    take(known, prompt_index, sample_index, values)
                elif known is not None:
                    known.interrupted = True
        elif kind == b"E" and (known := self._by_number.get(value[0])) is not None:
            known.progress, known.over = Progress(value[1]), value[2]
            if known.interrupted and known.progress is Progress.ENDED:
                known.progress = Progress.PARKED
        elif kind == b"Q" and value[1] is None:
            self.deaths.pop(value[0], None)
        elif kind == b"Q":
            self.deaths[value[0]] = Count(*value[1])
        elif kind == b"D" and (known := self._by_number.pop(value, None)) is not None:
            del self._records[known.key]


def _base(origin: str, facts: Sequence[tuple[Any, ...]], deaths: Mapping[bytes, Count]) -> Iterator[bytes]:
    yield b"O" + dumps(origin)
    for key, count in deaths.items():
        yield _deaths(key, count)
    for one in facts:
        yield b"R" + dumps(one)


def _deaths(key: bytes, count: Count | None) -> bytes:
    return b"Q" + dumps((key, count and (count.causes, count.guilty, count.when)))
