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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

from cluster.engine.request import FinishReason, Request, TokenEvent
from cluster.frontend.ledger.ledger_files import LedgerFolder
from cluster.frontend.ledger.ledger_records import (
    UNREADABLE,
    Content,
    Deaths,
    Item,
    Key,
    Line,
    Origin,
    Over,
    Progress,
    Record,
    Steps,
    dumps,
    loads,
    values_of,
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
        check_above_zero("ledger", self, [each.name for each in fields(self) if each.name != "fsync"])


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
        self._items: list[Item] = []
        self.deaths: dict[bytes, Count] = {}
        """What was running when engines died, by content: quarantine.py's."""
        self.folder = LedgerFolder(folder, self.config.segment_bytes, self.config.fsync)
        self.writer = LedgerWriter(self.folder)
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
        self._prune()
        due = self._begun + self.config.rewrite_seconds
        if self._forgotten and not self.folder.writes_base and self._clock() >= due:
            self._begin()

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
        record = Record(number=self._last, key=key, digest=digest, admitted=self._clock())
        record.content = Content(tuple(requests), shown)
        self._add(record)
        self._write(record.line())
        return record

    def reopen(self, record: Record) -> None:
        """The engine is, or will be, at it again."""
        self._unretain(record)
        record.open()
        record.interrupted = False
        self._note(record, Progress.RUNNING)

    def heard(self, record: Record, prompt_index: int, event: TokenEvent) -> None:
        """An event of the engine's; `flush` writes it."""
        values = values_of(event)
        if event.finish_reason in INTERRUPTED:
            record.interrupted = True
            values.pop("finish_reason"), values.pop("timings", None)
        if values:
            self._items.append((record.number, record.items, prompt_index, event.sample_index, values))
            record.take(self._items[-1])

    def flush(self) -> None:
        """One write for everything that was heard in a step."""
        if self._items:
            items, self._items = self._items, []
            self._write(Steps(items))

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
        if record.number in self._by_number:
            self._forget(record)
            self._write(Over(record.number, None))

    def note_deaths(self, key: bytes, count: Count | None) -> None:
        """Content that was running when an engine died, or (None) is no suspect any more; written at once."""
        self._write(Deaths(key, count))

    def close(self) -> None:
        self.flush()
        self.writer.close()

    # ------------------------------------------------------------ what is kept

    def _add(self, record: Record) -> None:
        if (old := self._records.get(record.key)) is not None:
            self._forget(old)
        self._records[record.key] = self._by_number[record.number] = record
        self._last = max(self._last, record.number)

    def _note(self, record: Record, progress: Progress) -> None:
        record.progress, record.over = progress, self._clock()
        self._write(Over(record.number, progress, record.over, record.items))

    def _retain(self, record: Record) -> None:
        record.packed, record.content = record.packed or dumps(record.unpacked()), None
        self._retained[record.number] = record
        self._retained_of.setdefault(record.key[0], {})[record.number] = record
        self._bytes_of[record.key[0]] += len(record.packed)

    def _unretain(self, record: Record) -> None:
        if (kept := self._retained.pop(record.number, None)) is not None:
            caller, own = kept.key[0], self._retained_of[kept.key[0]]
            del own[record.number]
            self._bytes_of[caller] -= len(kept.packed)
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
        return next((record for record in oldest if 2 * len(record.packed) * len(own) >= nbytes), oldest[0])

    def _forget(self, record: Record) -> None:
        self._unretain(record)
        del self._by_number[record.number], self._records[record.key]
        self._forgotten = True

    # ------------------------------------------------------------ the folder

    def _write(self, line: Line) -> None:
        self.writer.append(dumps(line))
        if self.writer.wants_base:
            self._begin()

    def _begin(self) -> None:
        self._begun, self._forgotten = self._clock(), False
        deaths = [Deaths(key, count) for key, count in self.deaths.items()]
        lines = [Origin(self._origin), *deaths, *(record.line() for record in self._records.values())]
        self.writer.begin(lambda: map(dumps, lines))

    def _recover(self) -> None:
        """Everything that can be read. Of a record of which something is missing what comes later is left out, too."""
        ours, unreadable = True, []
        for payload in self.folder.read():
            try:
                line = loads(payload)
                if isinstance(line, Origin):
                    ours = line.name == self._origin
                elif ours:
                    self._replay(line)
            except UNREADABLE as error:
                unreadable.append(error)
        if unreadable:
            log.error("%d records of the ledger are left out; the first: %s", len(unreadable), unreadable[0])
        for record in self._records.values():
            if record.progress is not Progress.RUNNING:
                self._retain(record)
        if self._records:
            log.warning("the ledger holds %d calls, %d of them open", len(self._records), len(self.unfinished()))

    def _replay(self, line: Line) -> None:
        if isinstance(line, Record):
            line.open()
            self._add(line)
        elif isinstance(line, Steps):
            for item in line.items:
                if (known := self._by_number.get(item[0])) is not None:
                    known.take(item)
        elif isinstance(line, Deaths):
            self.deaths.pop(line.key, None)
            if line.count is not None:
                self.deaths[line.key] = line.count
        elif isinstance(line, Over) and (known := self._by_number.get(line.number)) is not None:
            if line.progress is None:
                self._forget(known)
                return
            known.progress, known.over = line.progress, line.over
            if known.items != line.items and known.progress is Progress.ENDED:
                known.progress = Progress.PARKED
