"""A message's bytes in pieces: protobuf reads pieces one after the other as the one message that they are parts of.

A large answer is made and written so, since a call that serializes 64 MB holds the interpreter for half a second.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import Message


def joined(parts: Iterable[Message]) -> bytes:
    """The message whose parts these are: what repeats is appended, of single fields the last one counts."""
    return b"".join(part.SerializeToString() for part in parts)


def nested(number: int, pieces: Iterable[bytes]) -> bytes:
    """One message of field `number`, of its own bytes."""
    data = b"".join(pieces)
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
