"""Whether every field of a request message is in its range (cluster.frontend.requests.field_ranges), before anything is
done with it.

What is wrong is said of all fields at once, each by its path: sampling.temperature, sequences[3].advantages[7]. A
scalar without presence that was not sent is its default, and no rule is broken by a default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from cluster.frontend.requests.call import FrontendConfig
from cluster.frontend.requests.field_ranges import FIELDS, Range
from cluster.request_errors import InvalidRequest, Violation

MOST_VIOLATIONS = 8
UNCHECKED = frozenset({FieldDescriptor.TYPE_BOOL})


@dataclass(frozen=True)
class RangeCheck:
    """Checks messages for one front-end, whose settings are some of the bounds."""

    config: FrontendConfig

    def check(self, message: Message) -> None:
        """Raises InvalidRequest with the first fields that are out of their range."""
        found = tuple(islice(self._message(message, ""), MOST_VIOLATIONS))
        if found:
            raise InvalidRequest.of(found)

    @cached_property
    def _rows(self) -> Mapping[str, Mapping[str, Range]]:
        settings = {name: value for name, value in vars(self.config).items() if isinstance(value, int | float)}
        return {kind: {name: row.within(settings) for name, row in fields.items()} for kind, fields in FIELDS.items()}

    def _message(self, message: Message, path: str) -> Iterator[Violation]:
        descriptor = message.DESCRIPTOR
        rows = self._rows.get(descriptor.name, {})
        for field, value in message.ListFields():
            row, at = rows.get(field.name), f"{path}{field.name}"
            if is_map(field):
                yield from _map(value, row, at)
            elif field.is_repeated:
                yield from self._list(field, value, row, at)
            elif field.message_type is not None:
                yield from self._message(value, f"{at}.")
            else:
                yield from _scalar(field, value, row, at)
        for name in required(descriptor):
            if not getattr(message, name):
                yield Violation(f"{path}{name}", f"none given; give {rows[name].wanted_entries}")

    def _list(self, field: FieldDescriptor, values: Any, row: Range | None, at: str) -> Iterator[Violation]:
        assert row is not None and row.entries is not None, f"{at} has a row, as a test makes sure"
        problem = _count(values, row)
        if problem is not None:
            yield Violation(at, problem)
        elif field.message_type is not None:
            for index, item in enumerate(values):
                yield from self._message(item, f"{at}[{index}].")
        elif field.type == FieldDescriptor.TYPE_STRING:
            for index, item in enumerate(values):
                yield from _scalar(field, item, row, f"{at}[{index}]")
        elif not _holds_all(field, row) and (wrong := row.problem_at(values)) is not None:
            yield Violation(f"{at}[{wrong[0]}]", wrong[1])


def _holds_all(field: FieldDescriptor, row: Range) -> bool:
    """Whether the range is all of the type: long lists of token ids need not be looked at."""
    return field.type == FieldDescriptor.TYPE_UINT32 and row.low == 0 and row.high == 2**32 - 1


def _count(values: Any, row: Range) -> str | None:
    _, most = row.entries or (0, 0)
    assert not isinstance(most, str), "of a range whose settings are known"
    return None if len(values) <= most else f"{len(values)} entries; at most {most:g} are allowed"


def _scalar(field: FieldDescriptor, value: Any, row: Range | None, at: str) -> Iterator[Violation]:
    if field.enum_type is not None:
        if value not in field.enum_type.values_by_number:
            yield Violation(at, f"{value} is unknown; give one of {', '.join(field.enum_type.values_by_name)}")
    elif field.type not in UNCHECKED:
        assert row is not None, f"{at} has a row, as a test makes sure"
        if field.type == FieldDescriptor.TYPE_STRING:
            if row.problem(len(value)) is not None:
                yield Violation(at, f"{len(value)} characters; give {row.wanted}")
        elif (problem := row.problem(value)) is not None:
            yield Violation(at, problem)


def _map(values: Any, row: Range | None, at: str) -> Iterator[Violation]:
    assert row is not None and row.entries is not None and row.keys is not None, f"{at} has a row of a map"
    problem = _count(values, row)
    if problem is not None:
        yield Violation(at, problem)
        return
    keys = list(values)
    for rule, numbers in ((row.keys, keys), (row, [values[key] for key in keys])):
        if (wrong := rule.problem_at(numbers)) is not None:
            yield Violation(f"{at}[{keys[wrong[0]]}]", wrong[1])


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


@cache
def required(descriptor: Descriptor) -> tuple[str, ...]:
    """Lists that must not be empty."""
    rows = FIELDS.get(descriptor.name, {})
    return tuple(name for name, row in rows.items() if row.entries is not None and row.entries[0])
