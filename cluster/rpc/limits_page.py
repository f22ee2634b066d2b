"""docs/limits.md, printed from the table of ranges: `python -m cluster.rpc.limits_page > docs/limits.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from cluster.frontend.requests.call import FrontendConfig
from cluster.frontend.requests.field_ranges import FIELDS, Range
from cluster.rpc.codec.range_check import UNCHECKED, is_map
from cluster.rpc.services.interceptor import REQUEST_KINDS

TOP = """# Ranges of the requests' fields

This page is printed from the table that requests are checked against
(`python -m cluster.rpc.limits_page > docs/limits.md`).

A message is checked before anything is done with it. What is out of its range is answered `INVALID_ARGUMENT`
(`INVALID_FIELDS`), with the field, what was given and what may be given; NaN and infinity are in no range. Names in
`code` are settings of the server (`tp-decoders serve ... frontend.max_n=8`), listed at the end. What depends on the
model (token ids, the context, labels of a task) or on several fields at once is checked next; [serving.md](serving.md)
and [tasks.md](tasks.md) say how. What would cost more than one call may is answered `RESOURCE_EXHAUSTED`
(`DOES_NOT_FIT`) with the estimate, the limit and how to split the call.
"""


def page() -> str:
    """The whole page."""
    parts = [TOP]
    for descriptor in request_messages():
        rows = list(_rows(descriptor))
        if rows:
            parts += [f"\n## {descriptor.name}\n", "| field | range | remarks |", "| --- | --- | --- |", *rows]
    parts += ["\n## Settings of the server\n", "| setting | default |", "| --- | --- |"]
    for field in fields(FrontendConfig):
        if isinstance(field.default, int | float):
            parts.append(f"| `frontend.{field.name}` | {field.default:g} |" if field.default < 1e5 else _large(field))
    return "\n".join(parts) + "\n"


def _large(field: Any) -> str:
    return f"| `frontend.{field.name}` | {field.default} |"


def request_messages() -> list[Descriptor]:
    """Every message that a client can send, each once."""
    found: dict[str, Descriptor] = {}
    for kind in REQUEST_KINDS.values():
        _collect(cast(Descriptor, kind.DESCRIPTOR), found)
    return list(found.values())


def _collect(descriptor: Descriptor, found: dict[str, Descriptor]) -> None:
    if descriptor.full_name in found:
        return
    found[descriptor.full_name] = descriptor
    for field in descriptor.fields:
        if field.message_type is not None and not is_map(field):
            _collect(field.message_type, found)


def needs_row(field: FieldDescriptor) -> bool:
    """Numbers, texts and lists have a row; flags, single messages and names of an enumeration say themselves what
    they may be.
    """
    return field.is_repeated or (field.message_type is None and field.enum_type is None and field.type not in UNCHECKED)


def _rows(descriptor: Descriptor) -> Iterator[str]:
    for field in descriptor.fields:
        if needs_row(field):
            row = FIELDS[descriptor.name][field.name]
            yield f"| `{field.name}` | {_range(field, row)} | {row.why} |"
        elif field.enum_type is not None:
            yield f"| `{field.name}` | {', '.join(f'`{name}`' for name in field.enum_type.values_by_name)} | |"


def _range(field: FieldDescriptor, row: Range) -> str:
    if row.entries is None:
        return row.wanted
    if field.message_type is not None and row.keys is None:
        return row.wanted_entries
    keys = f"keys {row.keys.wanted}, values " if row.keys else "each "
    return f"{row.wanted_entries}, {keys}{row.wanted}"


if __name__ == "__main__":
    sys.stdout.write(page())
