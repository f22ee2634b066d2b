"""The front-end's memory of every open request: what was asked, with which seed, and the tokens already received.

From it an engine that was rebuilt is fed again (`resumed`): prompt and received tokens go in, the rest comes out, and
the reader sees a pause. An entry leaves when its last sample ends, so the journal is bounded by the number of open
requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from cluster.engine.request import FinishReason, Request, Timings, TokenEvent
from cluster.frontend.call_traces import PromptTrace
from cluster.frontend.ledger.ledger_records import Record
from cluster.frontend.output.best_of_filter import BestOf
from cluster.frontend.output.output_text import SampleText
from cluster.frontend.output.streams import Chunk, PromptInfo, Stream
from cluster.frontend.requests.call import Account
from cluster.frontend.requests.content_hash import ContentKeys
from cluster.frontend.requests.quarantine import Suspicion
from cluster.link.engine_link import EngineLink
from cluster.request_errors import DuplicateRequest
from parallel.errors import CapacityError, QueueFull


@dataclass(kw_only=True)
class SampleState:
    """One sample: the tokens received so far and its text."""

    text: SampleText
    prefix: Callable[[], str] | None = None  # text to send before the first piece (echo)
    token_ids: list[int] = field(default_factory=list)
    last: float | None = None  # when its last token came
    done: bool = False


@dataclass(kw_only=True, eq=False)
class Entry:
    """One prompt of one call while it is open. Times are of one monotonic clock."""

    request: Request
    call_id: str
    prompt_index: int
    stream: Stream
    samples: list[SampleState]
    admitted: float
    queued: float | None = None
    first_token: float | None = None
    prompt_logprobs_seen: bool = False
    announced: bool = False
    best_of: BestOf | None = None
    account: Account | None = None
    seat: AttachedEngine | None = None  # whose engine works on it; None while it waits for one
    trace: PromptTrace | None = None  # of a sampled call
    caller: str = ""  # whose call_id it is
    record: Record | None = None  # in the ledger, of a call that is to be remembered
    suspicion: Suspicion | None = None  # of the end of an engine

    @property
    def num_tokens(self) -> int:
        """Those it reads and those it may write."""
        return len(self.request.token_ids) + len(self.samples) * self._most_new

    @property
    def unfinished(self) -> list[int]:
        """The samples that have not ended."""
        return [index for index, sample in enumerate(self.samples) if not sample.done]

    @property
    def begun(self) -> bool:
        """Whether it has given a token."""
        return self.first_token is not None

    def content_key(self, keys: ContentKeys) -> bytes:
        """What it is counted by where it is suspected: a seed that nothing was drawn by yet does not matter."""
        drawn = any(sample.token_ids for sample in self.samples) and not self.request.sampling.greedy
        return keys.of(self.request, seed=drawn)

    @property
    def _most_new(self) -> int:
        reads_only = self.request.score_only or self.request.pooling is not None
        return 0 if reads_only else self.request.stopping.max_new_tokens or 0

    @property
    def done(self) -> bool:
        return all(sample.done for sample in self.samples)

    def take(self, event: TokenEvent, now: float) -> Chunk:
        """An engine's event as the reader will see it: text added, cut at a stop string, timings filled in."""
        sample = self.samples[event.sample_index]
        piece = sample.text.push(event.token_ids)
        stop, text, reason = piece.stop, piece.text, event.finish_reason
        if stop is None and reason is not None:
            rest = sample.text.finish()
            stop, text = rest.stop, text + rest.text
        new_ids = event.token_ids[: piece.num_tokens]
        if new_ids and self.first_token is None:
            self.first_token = now
        sample.token_ids += new_ids
        if stop is not None:
            reason = FinishReason.STOP
        sample.done = reason is not None
        self.prompt_logprobs_seen |= event.prompt_logprobs is not None
        if event.timings is not None:
            self.queued = event.timings.queued
        if sample.prefix is not None:
            text, sample.prefix = sample.prefix() + text, None
        chunk = self.chunk(event.sample_index, text)
        chunk.token_ids = list(new_ids)
        chunk.logprobs = list(event.logprobs[: piece.num_tokens])
        chunk.prompt_logprobs, chunk.pooled = event.prompt_logprobs, event.pooled
        chunk.finish_reason, chunk.stop_sequence = reason, stop
        chunk.stop_token_id = None if stop is not None else event.stop_token_id
        chunk.stop_logprob, chunk.score = None if stop is not None else event.stop_logprob, event.score
        chunk.weight_version = event.weight_version
        chunk.timings = self.timings(now) if reason is not None else None
        return chunk

    def show(self, chunk: Chunk) -> None:
        """To the reader, unless it has to be seen first which samples are the best."""
        for shown in [chunk] if self.best_of is None else self.best_of.take(chunk):
            self.stream.put(shown)

    def end(self, sample_index: int, reason: FinishReason, now: float) -> Chunk:
        """The end of a sample that the front-end decides on: what was held back goes out."""
        return self.take(
            TokenEvent(request_id=self.request.request_id, sample_index=sample_index, finish_reason=reason), now
        )

    def chunk(self, sample_index: int, text: str = "") -> Chunk:
        """News of a sample; the first of a prompt carries what is known of the prompt."""
        prompt = None if self.announced else self._info()
        self.announced = True
        return Chunk(prompt_index=self.prompt_index, sample_index=sample_index, text=text, prompt=prompt)

    def timings(self, now: float) -> Timings:
        first = now if self.first_token is None else self.first_token
        queued = 0.0 if self.queued is None else self.queued
        return Timings(queued=queued, first_token=first - self.admitted, total=now - self.admitted)

    def resumed(self, now: float) -> Request:
        """The request that makes a new engine go on where the old one stopped."""
        request = self.request
        response = replace(request.response, prompt_logprobs=None) if self.prompt_logprobs_seen else request.response
        return replace(
            request,
            response=response if not request.score_only else request.response,
            deadline=None if request.deadline is None else max(1e-3, request.deadline - (now - self.admitted)),
            resumed_ids=tuple(tuple(sample.token_ids) for sample in self.samples),
            finished_samples=tuple(index for index, sample in enumerate(self.samples) if sample.done),
        )

    def _info(self) -> PromptInfo:
        request = self.request
        return PromptInfo(
            num_tokens=len(request.token_ids),
            sampling=request.sampling,
            stopping=request.stopping,
            token_ids=request.token_ids if request.response.echo or request.wants_tokens else (),
        )


@dataclass(eq=False)
class AttachedEngine:
    """One engine of one replica and the requests that are open there."""

    replica: int
    link: EngineLink
    open: dict[str, Entry] = field(default_factory=dict)
    tokens: int = 0
    """Outstanding: of the prompts that are open there and of all that may be written to them."""
    heard: float = 0.0  # when it last told something, of the monotonic clock
    proved: bool = False  # it has told something, or a canary of it was right
    right: bool = False  # a canary of it was right
    late: int = 0  # canaries in a row that did not come back
    wrong: int = 0  # and that were wrong

    def take(self, entry: Entry) -> None:
        entry.seat = self
        self.open[entry.request.request_id] = entry
        self.tokens += entry.num_tokens
        if entry.trace is not None:
            entry.trace.placed(self.replica)

    def leave(self, entry: Entry) -> None:
        entry.seat = None
        if self.open.pop(entry.request.request_id, None) is not None:
            self.tokens -= entry.num_tokens


FEW = 64
"""With fewer places than this nothing is kept back for others."""


class OpenRequests:
    """Open entries by engine id, in order of admission; bounded by the number of their samples."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._max_of_one = max_open - max_open // 4 if max_open >= FEW else max_open
        self._samples_of: Counter[str] = Counter()  # by who shares the engine
        self._num_samples = 0
        self._entries: dict[str, Entry] = {}
        self._calls: dict[str, dict[str, list[str]]] = {}  # by the call's id, then by its caller

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(tuple(self._entries.values()))

    def get(self, request_id: str) -> Entry | None:
        return self._entries.get(request_id)

    def of_call(self, call_id: str) -> list[Entry]:
        """Of that name, whosever it is."""
        return [self._entries[request_id] for ids in self._calls.get(call_id, {}).values() for request_id in ids]

    def check_room(self, caller: str, call_id: str, count: int, sharer: str = "") -> None:
        """Refuse a call of `count` samples that cannot be added now. One caller never has the last quarter."""
        if caller in self._calls.get(call_id, {}):
            raise DuplicateRequest(f"request_id {call_id!r} is still open; give each call its own, or none")
        if count > self._max_of_one:
            raise CapacityError(
                f"{count} samples were sent and at most {self._max_of_one} may be open; send fewer at a time"
            )
        if self._num_samples + count > self._max_open:
            raise QueueFull(
                f"{self._num_samples} samples are open and {count} more were sent; "
                f"at most {self._max_open} may be open; retry later"
            )
        if self._samples_of[sharer] + count > self._max_of_one:
            raise QueueFull(
                f"{self._samples_of[sharer]} samples of this caller are open and {count} more were sent; "
                f"one caller may have {self._max_of_one} of {self._max_open}; retry later"
            )

    def add(self, entries: list[Entry]) -> None:
        """Open all entries of one call, or none."""
        if entries:
            count = sum(len(entry.samples) for entry in entries)
            sharer = entries[0].request.share.caller
            self.check_room(entries[0].caller, entries[0].call_id, count, sharer)
            if (account := entries[0].account) is not None:
                account.reserve(sum(entry.num_tokens for entry in entries))
            self._num_samples += count
            self._samples_of[sharer] += count
            self._entries.update((entry.request.request_id, entry) for entry in entries)
            calls = self._calls.setdefault(entries[0].call_id, {})
            calls[entries[0].caller] = [entry.request.request_id for entry in entries]

    def remove(self, entry: Entry) -> None:
        self._entries.pop(entry.request.request_id)
        if entry.account is not None:
            entry.account.release(entry.num_tokens)
        self._num_samples -= len(entry.samples)
        sharer = entry.request.share.caller
        self._samples_of[sharer] -= len(entry.samples)
        if not self._samples_of[sharer]:
            del self._samples_of[sharer]
        calls = self._calls[entry.call_id]
        calls[entry.caller].remove(entry.request.request_id)
        if not calls[entry.caller]:
            del calls[entry.caller]
        if not calls:
            del self._calls[entry.call_id]
