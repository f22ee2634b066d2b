"""Calls that the ledger knows: a retry gets the answer it would have got, and after a restart open calls go on.

    ended                        the answer again, from its first token
    parked (its reader left)     what was heard again, then the engine goes on
    running without a reader     the stream that has been filling since the restart
    running with a reader        refused, as ever

Replayed events take the same way as new ones (Entry.take). In the front-end's event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from cluster.engine.request import Request
from cluster.frontend.fleet.open_requests import Entry, OpenRequests
from cluster.frontend.fleet.request_builder import RequestBuilder
from cluster.frontend.fleet.request_lifecycle import RequestLifecycle
from cluster.frontend.ledger.ledger_records import Progress, Record, digest_of
from cluster.frontend.ledger.request_ledger import Ledger
from cluster.frontend.output.streams import Stream
from cluster.frontend.requests.call import Call
from cluster.frontend.requests.content_hash import ContentKeys
from cluster.request_errors import DuplicateRequest
from parallel.errors import RequestError, TpError

log = logging.getLogger(__name__)
TIDY_SECONDS = 15.0


class Replay:
    """The ledger beside the journal: `again` before a call is admitted, `record` when it was."""

    def __init__(
        self, ledger: Ledger, journal: OpenRequests, delivery: RequestLifecycle, opener: RequestBuilder
    ) -> None:
        self._ledger, self._journal, self._delivery, self._opener = ledger, journal, delivery, opener
        delivery.ledger = ledger

    def again(self, call: Call) -> Stream | None:
        """The stream of a call that was made before; None for one that was not."""
        record = self._ledger.find((call.caller, call.request_id), digest_of(call))
        if record is None:
            return None
        if record.progress is not Progress.RUNNING:
            log.info("request %s: asked again, answered from the ledger", call.request_id)
            return self._replayed(record, call)
        if record.orphan is None:
            raise DuplicateRequest(f"request_id {call.request_id!r} is still open; give each call its own, or none")
        return self._attached(record, record.orphan, call)

    def record(self, call: Call, made: Sequence[Request | RequestError], entries: Sequence[Entry]) -> None:
        """A call that was admitted; its prompts' ids are the client's."""
        record = self._ledger.admit((call.caller, call.request_id), digest_of(call), made, call.sampling.n)
        self._follow(record, entries)

    def go_on(self) -> None:
        """After a restart: open calls are computed on, for a while also without a reader. What expires is forgotten
        from now on, also where nothing is asked."""
        self._tidy()
        for record in self._ledger.unfinished():
            try:
                record.orphan = self._replayed(record, None)
            except TpError as error:
                log.error("request %s could not be taken up: %s", record.key[1], error)
                self._ledger.drop(record)
                continue
            seconds = self._ledger.config.orphan_seconds
            asyncio.get_running_loop().call_later(seconds, self._orphaned, record)

    def _tidy(self) -> None:
        self._ledger.tidy()
        asyncio.get_running_loop().call_later(TIDY_SECONDS, self._tidy)

    def forget(self, entries: Sequence[Entry]) -> None:
        """Ended by somebody's order: a retry is a new call."""
        for entry in entries:
            if entry.record is not None:
                self._ledger.drop(entry.record)

    def _replayed(self, record: Record, call: Call | None) -> Stream:
        content, now = record.unpacked(), time.monotonic()
        limit = None if call is None else call.deadline
        keys = ContentKeys()
        asked = [self._asked(request, limit, keys) for request in content.requests]
        stream, entries = self._opener.open(record.key[1], content.shown, asked)
        for entry in entries:
            entry.caller, entry.account = record.key[0], None if call is None else call.account
            self._delivery.quarantine.suspect(entry, partial(keys.both, entry.request))
            for event in content.events(entry.prompt_index):
                entry.show(entry.take(event, now))
            if entry.done and entry.trace is not None:
                entry.trace.over(now)
        left = [entry for entry in entries if not entry.done]
        if left:
            self._delivery.begin(left)  # refuses where there is no room
            self._ledger.reopen(record)
            self._follow(record, left)
            self._delivery.resume()
        elif record.progress is Progress.RUNNING:
            record.open_prompts = 0
            self._ledger.prompt_over(record, complete=True)
        return stream

    def _asked(self, made: Request | RequestError, limit: float | None, keys: ContentKeys) -> Request | RequestError:
        """As it was asked, unless it is in quarantine by now."""
        made = self._delivery.quarantine.screened(made, keys)
        return made if isinstance(made, RequestError) else replace(made, deadline=limit)

    def _attached(self, record: Record, stream: Stream, call: Call) -> Stream:
        entries = [entry for entry in self._journal.of_call(call.request_id) if entry.stream is stream]
        if call.account is not None:
            call.account.reserve(sum(entry.num_tokens for entry in entries))
            for entry in entries:
                entry.account = call.account
        self._delivery.limit(entries, call.deadline)
        record.orphan = None
        log.info("request %s: its reader is back", call.request_id)
        return stream

    def _follow(self, record: Record, entries: Sequence[Entry]) -> None:
        record.open_prompts = len(entries)
        for entry in entries:
            entry.record = record

    def _orphaned(self, record: Record) -> None:
        if (stream := record.orphan) is not None:
            record.orphan = None
            log.info("request %s: nobody came back for it; it is set aside", record.key[1])
            self._delivery.leave(stream)
