"""Bytes to request messages, refusing what protobuf would let pass.

Protobuf keeps fields it does not know (a newer client's parameter, a known number with the wrong wire type) and goes
on without them; here they are errors that name the number. A message of very many tiny fields, which would cost far
more memory and time than its bytes, is refused before it is parsed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from cluster.request_errors import InvalidRequest, Violation

MAX_FIELDS = 100_000  # a map's entry counts as one
COUNTED_FROM_BYTES = 256 * 1024  # smaller messages cannot hold enough fields to matter

VARINT, DELIMITED = 0, 2
FIXED_SIZES = {1: 8, 5: 4}


def parse(kind: type[Message], data: bytes) -> Message:
    """The message in `data`, or InvalidRequest."""
    if len(data) > COUNTED_FROM_BYTES:
        _check_count(kind, data)
    try:
        message = kind.FromString(data)
    except (DecodeError, ValueError) as error:
        raise _invalid(kind.DESCRIPTOR.name, f"{len(data)} bytes that are no such message: {error}") from error
    unknown = next(_unknown(message, ""), None)
    if unknown is not None:
        path, number = unknown
        rule = "unknown to this server, or sent with another type than it has; remove it or use the server's .proto"
        raise _invalid(f"{path}field number {number}", rule)
    return message


def _invalid(field: str, rule: str) -> InvalidRequest:
    return InvalidRequest.of([Violation(field, rule)])


def _unknown(message: Message, path: str) -> Iterator[tuple[str, int]]:
    unknowns: Any = UnknownFieldSet(message)  # iterable, whatever its stub says
    for unknown in unknowns:
        yield path, unknown.field_number
    for field, value in message.ListFields():
        if field.message_type is None or _is_map(field):
            continue
        for index, item in enumerate(value) if field.is_repeated else [(None, value)]:
            at = field.name if index is None else f"{field.name}[{index}]"
            yield from _unknown(item, f"{path}{at}.")


def _is_map(field: Any) -> bool:
    return bool(field.message_type.GetOptions().map_entry)


def _check_count(kind: type[Message], data: bytes) -> None:
    beyond = next(islice(_fields(memoryview(data), kind.DESCRIPTOR), MAX_FIELDS, None), None)
    if beyond is not None:
        raise _invalid(kind.DESCRIPTOR.name, f"more than {MAX_FIELDS} fields in {len(data)} bytes; send less at a time")


def _fields(data: memoryview, descriptor: Any) -> Iterator[int]:
    """Every field's number, nested ones too; stops quietly at what is no message, which the parser then reports."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        yield tag >> 3
        if wire == VARINT:
            _, at = _varint(data, at)
        elif wire in FIXED_SIZES:
            at += FIXED_SIZES[wire]
        elif wire == DELIMITED:
            size, at = _varint(data, at)
            field = descriptor.fields_by_number.get(tag >> 3)
            if field is not None and field.message_type is not None and not _is_map(field):
                yield from _fields(data[at : at + size], field.message_type)
            at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
    return value, at
