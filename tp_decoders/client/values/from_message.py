"""Frozen dataclasses from the protocol's messages, by the names and types of their fields.

A field of the dataclass is the message's of the same name, or of the name in its metadata (`named`). `X | None` is
None where the message does not have it; an enumeration's zero counts as not there; a message of one repeated field
stands for its values where a tuple is wanted.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar

from google.protobuf.message import Message

T = TypeVar("T")
Reader = Callable[[Any], Any]


def named(name: str, **default: Any) -> Any:
    """A dataclass field under another name than the message's."""
    return dataclasses.field(metadata={"name": name}, **default)


def local(**default: Any) -> Any:
    """A dataclass field that is no field of the message; given to `read`, or left at its default."""
    return dataclasses.field(metadata={"name": ""}, **default)


def read(kind: type[T], message: Message, **given: Any) -> T:
    """The dataclass with the message's values; `given` are fields that the message does not have."""
    values = {name: reader(message) for name, reader in _plan(typing.cast(Any, kind))}
    return kind(**values, **given)


@cache
def _plan(kind: Any) -> tuple[tuple[str, Reader], ...]:
    hints = typing.get_type_hints(kind)
    plan = []
    for field in dataclasses.fields(kind):
        name = field.metadata.get("name", field.name)
        if name:
            plan.append((field.name, _field_reader(name, hints[field.name])))
    return tuple(plan)


def _field_reader(name: str, hint: Any) -> Reader:
    inner = _optional(hint)
    if inner is None:
        value = _value_reader(hint)
        return lambda message: value(getattr(message, name))
    value, enum = _value_reader(inner), isinstance(inner, type) and issubclass(inner, StrEnum)

    def reader(message: Message) -> Any:
        there = getattr(message, name) if enum else message.HasField(name)
        return value(getattr(message, name)) if there else None

    return reader


def _value_reader(hint: Any) -> Reader:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        item = _value_reader(arguments[0])
        plain = item is _as_it_is

        def items(found: Any) -> tuple[Any, ...]:
            if isinstance(found, Message):  # of one repeated field
                found = getattr(found, found.DESCRIPTOR.fields[0].name)
            return tuple(found) if plain else tuple(map(item, found))

        return items
    if origin is not None and issubclass(origin, Mapping):
        return dict
    if dataclasses.is_dataclass(hint):
        return lambda found: read(typing.cast(Any, hint), found)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        members = list(hint)
        return lambda number: members[number - 1] if 0 < number <= len(members) else None
    return _as_it_is


def _as_it_is(found: Any) -> Any:
    return found


def _optional(hint: Any) -> Any:
    """What X is of X | None; None of anything else."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        left = [part for part in typing.get_args(hint) if part is not type(None)]
        return left[0] if len(left) == 1 else None
    return None
