"""What a ledger holds of one call, and the lines of its files: MessagePack, of which reading makes nothing else.

A record's events are put together as they come: of each sample one growing event is kept, in plain values. What the
engine was asked and what it said becomes requests, errors and events again, by their types. Writes nothing anywhere.
"""

from __future__ import annotations

import enum
from hashlib import sha256
from typing import Any

import msgspec
from msgspec import structs

from cluster.engine.request import Request, TokenEvent
from cluster.engine.top_logprobs import Alternatives
from cluster.frontend.output.streams import Stream
from cluster.frontend.requests.call import Call
from cluster.frontend.requests.quarantine import Count
from cluster.request_errors import DoesNotFit, InvalidRequest, NoGuides, NoTokenizer, Quarantined, Violation
from parallel.errors import CapacityError, RequestError

REFUSALS = (CapacityError, DoesNotFit, InvalidRequest, NoGuides, NoTokenizer, Quarantined, RequestError)
FACTS = {"violations": tuple[Violation, ...], "deaths": int, "causes": tuple[str, ...]}
"""What they say beside their message."""
FIELDS = {f.name: f for f in structs.fields(TokenEvent) if f.name not in ("request_id", "sample_index")}
PLAIN = {"token_ids", "weight_version"}
GROWING = ("token_ids", "logprobs")
UNREADABLE = (msgspec.MsgspecError, TypeError, ValueError, LookupError)

Key = tuple[str, str]
"""Caller and request_id."""
Heard = dict[str, Any]
"""All events of one sample put together, by field, in plain values; what has its default is left out."""
Item = tuple[int, int, int, int, Heard]
"""Of which record, which of its events (a gap is seen), of which prompt and sample."""


class Progress(enum.Enum):
    """RUNNING: the engine is at it. PARKED: it stopped before the end. ENDED: the answer is complete."""

    RUNNING = "running"
    PARKED = "parked"
    ENDED = "ended"


class Content(msgspec.Struct, array_like=True):
    """A call as the engine was asked, one request or refusal per prompt, and what was heard of each sample."""

    requests: tuple[Request | RequestError, ...]
    shown: int  # samples that the reader gets of each prompt
    heard: dict[tuple[int, int], Heard] = {}  # by prompt and sample

    def events(self, prompt_index: int) -> list[TokenEvent]:
        """What was heard of a prompt, as one event per sample."""
        return [_event(sample, heard) for (prompt, sample), heard in self.heard.items() if prompt == prompt_index]


class Origin(msgspec.Struct, array_like=True, tag="O"):
    """What gave the answers that follow."""

    name: str


class Record(msgspec.Struct, array_like=True, kw_only=True, eq=False, dict=True, tag="R"):
    """One call. Its fields are written; the rest is of this process. `content` while it is open, `packed` once it is
    over, and in what is written.
    """

    number: int
    key: Key
    digest: bytes
    admitted: float  # of the clock on the wall, as `over`
    progress: Progress = Progress.RUNNING
    over: float = 0.0
    items: int = 0  # events heard
    packed: bytes = b""

    def __post_init__(self) -> None:
        self.content: Content | None = None
        self.open_prompts, self.interrupted = 0, False
        self.orphan: Stream | None = None  # of a call that goes on without its reader

    def unpacked(self) -> Content:
        return self.content or unpack(self.packed)

    def open(self) -> None:
        self.content, self.packed = self.unpacked(), b""

    def line(self) -> Record:
        """As it is now."""
        return structs.replace(self, packed=self.packed or dumps(self.unpacked()))

    def take(self, item: Item) -> None:
        """One event more. One that is known (a base has what its log's first lines have) is left out, and so is what
        comes after one that is missing.
        """
        assert self.content is not None, "what is heard belongs to an open record"
        _, index, prompt_index, sample_index, values = item
        if index != self.items:
            return
        self.items += 1
        heard = self.content.heard.setdefault((prompt_index, sample_index), {})
        for name, value in values.items():
            if name in GROWING:
                heard.setdefault(name, []).extend(value)
            elif name == "weight_version":
                heard[name] = max(heard.get(name, 0), value)
            else:
                heard[name] = value


class Steps(msgspec.Struct, array_like=True, tag="S"):
    """Everything that was heard in a step."""

    items: list[Item]


class Over(msgspec.Struct, array_like=True, tag="E"):
    """A call that ended, was parked or runs again; None: nothing of it is kept."""

    number: int
    progress: Progress | None
    over: float = 0.0
    items: int = 0  # that it had by then


class Deaths(msgspec.Struct, array_like=True, tag="Q"):
    """Content that was running when engines died, or (None) is no suspect any more."""

    key: bytes
    count: Count | None


Line = Origin | Record | Steps | Over | Deaths


def digest_of(call: Call) -> bytes:
    """Of all that decides on the answer."""
    prompts = [(p.text, None if p.token_ids is None else tuple(p.token_ids), p.fim) for p in call.prompts]
    bias = sorted(call.sampling.logit_bias.items())
    sampling = {**vars(call.sampling), "logit_bias": bias}
    values = (prompts, sampling, call.stopping, call.response, call.bad_words, call.score, call.reading)
    return sha256(repr(values).encode()).digest()


def values_of(event: TokenEvent) -> Heard:
    """What it says, in plain values."""
    values = {name: value for name, field in FIELDS.items() if (value := getattr(event, name)) != field.default}
    if values.keys() <= PLAIN:  # as those of nearly every step
        return values
    return msgspec.to_builtins(values, builtin_types=(bytes,), enc_hook=_plain)


def _event(sample_index: int, heard: Heard) -> TokenEvent:
    values = {name: msgspec.convert(value, FIELDS[name].type, dec_hook=_typed) for name, value in heard.items()}
    return TokenEvent(request_id="", sample_index=sample_index, **values)


def _typed(kind: type, value: object) -> object:
    if kind is Alternatives and isinstance(value, bytes):
        return Alternatives(value)
    raise ValueError(f"no {kind.__name__}")


def unpack(data: bytes) -> Content:
    """Raises one of UNREADABLE where it cannot be, as `loads`."""
    requests, shown, heard = msgspec.msgpack.decode(data)
    return Content(tuple(map(_asked, requests)), shown, heard)


def _asked(values: Any) -> Request | RequestError:
    if isinstance(values, dict):
        return msgspec.convert(values, Request)
    name, message, facts = values
    error = {kind.__name__: kind for kind in REFUSALS}[name](message)
    vars(error).update({name: msgspec.convert(value, FACTS[name]) for name, value in facts.items()})
    return error


def _plain(value: object) -> object:
    """Of what MessagePack does not know."""
    if isinstance(value, Alternatives):
        return value.data
    assert isinstance(value, RequestError), f"a ledger has no place for {type(value).__name__}"
    kind = next(kind for kind in type(value).__mro__ if kind in REFUSALS)
    return kind.__name__, str(value), {name: fact for name, fact in vars(value).items() if name in FACTS}


dumps = msgspec.msgpack.Encoder(enc_hook=_plain).encode
loads = msgspec.msgpack.Decoder(Line).decode
