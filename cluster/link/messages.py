"""What a front-end and rank 0 say to each other: typed messages, and their bytes.

A message is a Struct of this file, known by its tag and decoded by the types of its fields: bytes that arrive make
nothing else come into being.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from msgspec import Struct, msgpack

import cluster.request_errors
import cluster.training.train_calls
import parallel.errors
from cluster.engine.request import EngineLoad, ModelLimits, Request
from cluster.engine.top_logprobs import Alternatives
from cluster.link.engine_link import LinkEvent, SampleId
from cluster.safe_text import for_terminal
from cluster.training.train_calls import TrainAnswer, TrainCall
from parallel.errors import TpError

MAX_BYTES = 1 << 30
LENGTH = struct.Struct("!I")


class Message(Struct, frozen=True, array_like=True, tag=True):
    """What follows, by name."""


class Hello(Message, frozen=True):
    """Server to client, once, after the proofs."""

    limits: ModelLimits
    node: str


class Submit(Message, frozen=True):
    requests: tuple[Request, ...]


class Abort(Message, frozen=True):
    request_ids: tuple[str, ...]
    samples: tuple[SampleId, ...] = ()


class AskLoad(Message, frozen=True):
    tag: int
    prove: bool = False


class LoadAnswer(Message, frozen=True):
    tag: int
    load: EngineLoad


class Train(Message, frozen=True):
    tag: int
    call: TrainCall


class CancelTrain(Message, frozen=True):
    tag: int


class Trained(Message, frozen=True):
    tag: int
    answer: TrainAnswer


class TrainingRefused(Message, frozen=True):
    tag: int
    error: TpError


class Events(Message, frozen=True):
    events: Sequence[LinkEvent]


class Fault(Message, frozen=True):
    cause: str


class Beat(Message, frozen=True):
    """I am alive."""


class Bye(Message, frozen=True):
    """I close on purpose."""


KINDS = (Hello | Submit | Abort | AskLoad | LoadAnswer | Train | CancelTrain | Trained | TrainingRefused
         | Events | Fault | Beat | Bye)  # fmt: skip
ERRORS = {
    kind.__name__: kind
    for module in (parallel.errors, cluster.request_errors, cluster.training.train_calls)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, TpError)
}
"""Those that travel, as their name and message; of another one its nearest ancestor here."""


def _plain(value: object) -> object:
    if isinstance(value, Alternatives):
        return value.data
    if isinstance(value, TpError):
        return next(kind.__name__ for kind in type(value).__mro__ if kind in ERRORS.values()), for_terminal(str(value))
    raise TypeError(f"a {type(value).__name__} has no place in a message")


def _typed(kind: type, value: object) -> object:
    if kind is Alternatives and isinstance(value, bytes):
        return Alternatives(value)
    if kind is TpError and isinstance(value, list) and len(value) == 2 and value[0] in ERRORS:
        return ERRORS[value[0]](str(value[1]))
    raise ValueError(f"no {kind.__name__}")


_ENCODER = msgpack.Encoder(enc_hook=_plain)
_DECODER: msgpack.Decoder[Message] = msgpack.Decoder(KINDS, dec_hook=_typed)


def encode(message: Message) -> bytearray:
    """The message behind its length. ValueError where it is larger than a peer takes."""
    frame = bytearray(LENGTH.size)
    _ENCODER.encode_into(message, frame, LENGTH.size)
    size = len(frame) - LENGTH.size
    if size > MAX_BYTES:
        raise ValueError(f"a message of {size} bytes; at most {MAX_BYTES}")
    LENGTH.pack_into(frame, 0, size)
    return frame


def decode(body: bytes) -> Message:
    """What follows a length. Raises msgspec.MsgspecError where it is no message."""
    return _DECODER.decode(body)
