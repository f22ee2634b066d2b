"""What a ledger holds of one call, and how that becomes bytes and is read again.

A record's events are put together as they come: of each sample one growing event is kept. Bytes are pickles, read by an
unpickler that knows the few kinds below and makes nothing else. Writes nothing anywhere.
"""

from __future__ import annotations

import enum
import io
import pickle
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from msgspec import structs

from cluster.engine.request import (
    BeamParams,
    FinishReason,
    Pooling,
    Request,
    ResponseOptions,
    SamplingParams,
    Share,
    StoppingCriteria,
    Timings,
    TokenEvent,
    TokenLogprobs,
)
from cluster.engine.top_logprobs import Alternatives
from cluster.frontend.output.streams import Stream
from cluster.frontend.requests.call import Call
from cluster.request_errors import DoesNotFit, InvalidRequest, NoTokenizer, Quarantined, Violation
from parallel.errors import CapacityError, RequestError

KNOWN = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        Alternatives, BeamParams, FinishReason, Pooling, Request, ResponseOptions, SamplingParams, Share,
        StoppingCriteria, Timings,
        TokenLogprobs, CapacityError, DoesNotFit, InvalidRequest, NoTokenizer, Quarantined, RequestError, Violation,
    )
}  # fmt: skip
"""All that a record may hold beside plain values: a file makes nothing else come into being."""
UNREADABLE = (pickle.UnpicklingError, TypeError, ValueError, AttributeError, EOFError, LookupError)
NAMES = {f.name: f.default for f in structs.fields(TokenEvent) if f.name not in ("request_id", "sample_index")}
GROWING = ("token_ids", "logprobs")

Key = tuple[str, str]
"""Caller and request_id."""
Heard = dict[str, Any]
"""All events of one sample put together, by field; what has its default is left out."""


class Progress(enum.Enum):
    """RUNNING: the engine is at it. PARKED: it stopped before the end. ENDED: the answer is complete."""

    RUNNING = "running"
    PARKED = "parked"
    ENDED = "ended"


@dataclass(kw_only=True)
class Content:
    """A call as the engine was asked, one request or refusal per prompt, and what was heard of each sample."""

    requests: tuple[Request | RequestError, ...]
    shown: int  # samples that the reader gets of each prompt
    heard: dict[tuple[int, int], Heard] = field(default_factory=dict)

    def events(self, prompt_index: int) -> list[TokenEvent]:
        """What was heard of a prompt, as one event per sample."""
        found = [(sample, heard) for (prompt, sample), heard in self.heard.items() if prompt == prompt_index]
        grown = [(sample, {**h, **{name: tuple(h[name]) for name in GROWING if name in h}}) for sample, h in found]
        return [TokenEvent(request_id="", sample_index=sample, **values) for sample, values in grown]


@dataclass(kw_only=True, eq=False)
class Record:
    """One call. `content` while it is open, `packed` once it is over."""

    number: int
    key: Key
    digest: bytes
    admitted: float  # of the clock on the wall, as `over`
    content: Content | None = None
    packed: bytes | None = None
    progress: Progress = Progress.RUNNING
    over: float = 0.0
    items: int = 0  # events heard
    open_prompts: int = 0
    interrupted: bool = False
    orphan: Stream | None = None  # of a call that goes on without its reader

    def unpacked(self) -> Content:
        if self.content is not None:
            return self.content
        assert self.packed is not None, "a record has its content in one form or the other"
        requests, shown, heard = loads(self.packed)
        return Content(requests=requests, shown=shown, heard=heard)

    def facts(self) -> tuple[Any, ...]:
        packed = self.packed or pack(self.unpacked())
        over = (self.progress.value, self.over, self.items)
        return (self.number, self.key, self.digest, self.admitted, *over, packed)


def digest_of(call: Call) -> bytes:
    """Of all that decides on the answer."""
    prompts = [(p.text, None if p.token_ids is None else tuple(p.token_ids), p.fim) for p in call.prompts]
    bias = sorted(call.sampling.logit_bias.items())
    sampling = {**vars(call.sampling), "logit_bias": bias}
    values = (prompts, sampling, call.stopping, call.response, call.bad_words, call.score, call.reading)
    return sha256(repr(values).encode()).digest()


def take(record: Record, prompt_index: int, sample_index: int, values: Heard) -> None:
    """One event more."""
    assert record.content is not None, "what is heard belongs to an open record"
    record.items += 1
    heard = record.content.heard.setdefault((prompt_index, sample_index), {})
    for name, value in values.items():
        if name in GROWING:
            heard.setdefault(name, []).extend(value)
        elif name == "weight_version":
            heard[name] = max(heard.get(name, 0), value)
        else:
            heard[name] = value


def pack(content: Content) -> bytes:
    return dumps((content.requests, content.shown, content.heard))


def dumps(value: object) -> bytes:
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


class _Reader(pickle.Unpickler):
    """Plain values and the kinds above, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a ledger")
        return KNOWN[module, name]


def loads(data: bytes) -> Any:
    """Raises one of UNREADABLE where it cannot be."""
    return _Reader(io.BytesIO(data)).load()
