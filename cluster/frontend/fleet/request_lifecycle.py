"""What happens to open requests: the engine's events go to their streams, and every way a request can end.

A reader that leaves, a deadline, a stop string, an abort and an error all end here, and all tell the engine (through
the fleet), so that it frees the request's memory within one step. Runs in the front-end's event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from cluster.engine.request import FinishReason, TokenEvent
from cluster.frontend.fleet.fleet import Fleet
from cluster.frontend.fleet.open_requests import AttachedEngine, Entry, OpenRequests
from cluster.frontend.fleet.request_metrics import RequestMetrics
from cluster.frontend.fleet.suspect_trials import SuspectTrials
from cluster.frontend.ledger.request_ledger import Ledger
from cluster.frontend.output.streams import Stream
from cluster.frontend.requests.quarantine import Quarantine
from cluster.link.engine_link import LinkEvent, Rejected
from cluster.request_errors import EngineFault, RequestFailed
from parallel.errors import TpError

log = logging.getLogger(__name__)


class RequestLifecycle:
    """Applies events to the journal's entries and ends them."""

    def __init__(
        self, journal: OpenRequests, loop: asyncio.AbstractEventLoop, fleet: Fleet, quarantine: Quarantine | None = None
    ) -> None:
        self._journal = journal
        self._loop = loop
        self._fleet = fleet
        self._deadlines: dict[str, asyncio.TimerHandle] = {}
        self.quarantine = quarantine or Quarantine()
        self.trials = SuspectTrials(fleet, self.quarantine)
        self.meters = RequestMetrics()
        self.ledger: Ledger | None = None
        self.quiet = asyncio.Event()
        """Set while nothing is open."""
        self.quiet.set()

    def begin(self, entries: list[Entry]) -> None:
        """Open the entries of one call. The engine ends a request at its deadline; the timer holds where the engine
        cannot.
        """
        self._journal.add(entries)
        self.quiet.clear()
        for entry in entries:
            self.limit([entry], entry.request.deadline)

    def limit(self, entries: Sequence[Entry], seconds: float | None) -> None:
        """They end as late as that."""
        if seconds is None:
            return
        for entry in entries:
            timer = self._loop.call_later(seconds, self.end, [entry], FinishReason.DEADLINE)
            self._deadlines[entry.request.request_id] = timer

    def apply(self, seat: AttachedEngine, events: Sequence[LinkEvent]) -> None:
        """Everything that happened in one step of an engine. What belongs to no request that is open there is late
        news, and dropped.
        """
        now = seat.heard = time.monotonic()
        self._fleet.prove(seat)
        for event in events:
            entry = self._journal.get(event.request_id)
            if entry is None or entry.seat is not seat:
                continue
            if isinstance(event, Rejected):
                self.fail(entry, event.error)
            elif event.step is not None:
                if entry.trace is not None:
                    entry.trace.step(event.step, now)
            elif event.finish_reason is FinishReason.ERROR:
                self._fleet.abort([entry])
                self.fail(entry, RequestFailed(event.error or "the engine reported an error without a message"))
            elif not entry.samples[event.sample_index].done:
                if entry.record is not None and self.ledger is not None:
                    self.ledger.heard(entry.record, entry.prompt_index, event)
                self._take(entry, event, now)
        if self.ledger is not None:
            self.ledger.flush()  # before any reader has seen it

    def end(self, entries: Sequence[Entry], reason: FinishReason) -> None:
        """End entries from this side: readers get what there is and the reason."""
        now = time.monotonic()
        self._fleet.abort(entries)
        for entry in entries:
            if entry.trace is not None:
                entry.trace.outcome = reason.value
            for index, sample in enumerate(entry.samples):
                if not sample.done:
                    entry.show(entry.end(index, reason, now))
                    self.meters.ended(reason)
            self._forget(entry, complete=False)

    def fail(self, entry: Entry, error: TpError) -> None:
        """End an entry with an error."""
        chunk = entry.chunk(0)
        chunk.error = error
        entry.stream.put(chunk)
        self.meters.failed_with(error)
        if entry.trace is not None:
            entry.trace.failed = type(error).__name__
        if self.ledger is not None and entry.record is not None and not isinstance(error, EngineFault):
            self.ledger.drop(entry.record)
        self._forget(entry, complete=False)

    def leave(self, stream: Stream) -> None:
        """The reader is gone: nobody needs the rest."""
        self.end(
            [entry for entry in self._journal.of_call(stream.request_id) if entry.stream is stream],
            FinishReason.ABORTED,
        )

    def resume(self) -> None:
        """What sits nowhere goes on with the engines there are; what had all its tokens only missed its end."""
        now = time.monotonic()
        for entry in self._journal:
            if entry.seat is None:
                self._end_full_samples(entry, now)
        self.trials.submit([entry for entry in self._journal if entry.seat is None], resumed=True)

    def quarantined(self, guilty: Entry) -> None:
        """It is not run again, nor what asks the same."""
        error = self.quarantine.convict(guilty)
        key = None if guilty.suspicion is None else guilty.suspicion.key
        log.error(
            "request %s, prompt %d: %s", guilty.call_id, guilty.prompt_index, error,
            extra={"request_id": guilty.call_id},
        )  # fmt: skip
        for entry in [each for each in self._journal if each.suspicion is not None and each.suspicion.key == key]:
            self._fleet.abort([entry])
            self.fail(entry, error)

    def _take(self, entry: Entry, event: TokenEvent, now: float) -> None:
        try:
            chunk = entry.take(event, now)
        except Exception as error:
            log.exception(
                "request %s: its tokens could not be turned into an answer", event.request_id,
                extra={"request_id": entry.call_id},
            )  # fmt: skip
            self._fleet.abort([entry])
            self.fail(
                entry, RequestFailed(f"the tokens could not be turned into text: {type(error).__name__}: {error}")
            )
            return
        if entry.suspicion is not None and event.token_ids:
            self.trials.took(entry, event.sample_index, len(event.token_ids))
        self.meters.took(entry, chunk, now)
        if entry.trace is not None:
            entry.trace.took(chunk, now)
        entry.show(chunk)
        if chunk.finish_reason is not None and event.finish_reason is None:
            self._stop_sample(entry, event.sample_index)
        if entry.done:
            self._forget(entry)

    def _stop_sample(self, entry: Entry, sample_index: int) -> None:
        """A stop string ended a sample that the engine still works on."""
        if entry.done:
            self._fleet.abort([entry])
        else:
            self._fleet.abort_sample(entry, sample_index)

    def _end_full_samples(self, entry: Entry, now: float) -> None:
        """A sample whose last token came without its end, because the engine died between the two."""
        most = entry.request.stopping.max_new_tokens
        for index, sample in enumerate(entry.samples):
            if not (sample.done or not entry.request.continues or most is None or len(sample.token_ids) < most):
                entry.show(entry.end(index, FinishReason.LENGTH, now))
                self.meters.ended(FinishReason.LENGTH)
        if entry.done:
            self._forget(entry)

    def _forget(self, entry: Entry, complete: bool = True) -> None:
        now = time.monotonic()
        if self.ledger is not None and entry.record is not None:
            self.ledger.prompt_over(entry.record, complete)
        self.meters.over(entry, now)
        if entry.trace is not None:
            entry.trace.over(now)
        if log.isEnabledFor(logging.INFO):
            log.info(
                "request %s: prompt %d of %d tokens is over after %.3f s, with %d tokens", entry.call_id,
                entry.prompt_index, len(entry.request.token_ids), now - entry.admitted,
                sum(len(sample.token_ids) for sample in entry.samples), extra={"request_id": entry.call_id},
            )  # fmt: skip
        self._journal.remove(entry)
        self._fleet.leave(entry)
        if entry.suspicion is not None:
            if complete:
                self.quarantine.clear(entry)
            self.trials.ended(entry)
        timer = self._deadlines.pop(entry.request.request_id, None)
        if timer is not None:
            timer.cancel()
        if not len(self._journal):
            self.quiet.set()
