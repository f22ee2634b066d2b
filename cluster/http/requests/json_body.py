"""A request's JSON, read strictly, and its fields by name and type.

A field that is null is one that was not sent. Refused: a key given twice, NaN and Infinity, what is no object. Fields
that nobody asks for are ignored, and named in the log once.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from cluster.request_errors import InvalidRequest, Violation

log = logging.getLogger(__name__)
T = TypeVar("T")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
MAX_NAMED = 256
"""Unknown fields that are named in the log; whoever sends more is not written down for ever."""
_named: set[str] = set()


def parse(data: bytes) -> dict[str, Any]:
    """The object in the bytes."""
    try:
        found = json.loads(data.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_once)
    except RecursionError:
        raise invalid("body", "is nested too deeply") from None
    except ValueError as error:
        raise invalid("body", f"is not JSON: {error}") from None
    if SURROGATE.search(data) and not _is_unicode(found):
        raise invalid("body", "has a lone surrogate in a text; give valid Unicode")
    if not isinstance(found, dict):
        raise invalid("body", f"is {_kind(found)}; give an object")
    return found


def invalid(field: str, rule: str) -> InvalidRequest:
    return InvalidRequest.of([Violation(field, rule)])


class Fields:
    """The fields of one object. Each is asked for once, with its type."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values, self._path = values, path
        self._asked: set[str] = set()

    def any(self, name: str) -> Any:
        """The value as it was sent; None where it was not."""
        self._asked.add(name)
        return self._values.get(name)

    def whole(self, name: str, default: T) -> int | T:
        return self._typed(name, int, "a whole number", default)

    def number(self, name: str, default: T) -> float | T:
        value = self.any(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._refuse(name, value, "a number")
        try:
            return float(value)
        except OverflowError:
            self._refuse(name, value, "a smaller number")

    def flag(self, name: str, default: bool = False) -> bool:
        return self._typed(name, bool, "true or false", default)

    def text(self, name: str, default: T) -> str | T:
        return self._typed(name, str, "text", default)

    def texts(self, name: str) -> tuple[str, ...]:
        """One text, or a list of them."""
        value = self.any(name)
        if value is None:
            return ()
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            self._refuse(name, value, "text or a list of texts")
        return tuple(items)

    def ids(self, name: str) -> tuple[int, ...]:
        value = self.any(name)
        if value is None:
            return ()
        if not is_ids(value):
            self._refuse(name, value, "a list of token ids")
        return tuple(value)

    def section(self, name: str) -> Fields:
        """The fields of an object in it; of none where it was not sent."""
        value = self.any(name)
        if value is not None and not isinstance(value, dict):
            self._refuse(name, value, "an object")
        return Fields(value or {}, f"{self._path}{name}.")

    def names(self) -> list[str]:
        return list(self._values)

    def all(self) -> dict[str, Any]:
        """As they were sent."""
        return dict(self._values)

    def given(self, name: str) -> bool:
        """Whether it was sent with anything in it."""
        return self.any(name) not in (None, [], {}, "")

    def ignore(self, names: frozenset[str] = frozenset()) -> None:
        """The rest means nothing here; `names` are those that are known to be sent for nothing."""
        for name in self._values:
            if name not in self._asked | names | _named and len(_named) < MAX_NAMED:
                _named.add(name)
                log.warning("the field %.80r of HTTP requests is unknown here and ignored", f"{self._path}{name}")

    def _typed(self, name: str, kind: type[Any], words: str, default: Any) -> Any:
        value = self.any(name)
        if value is None:
            return default
        if type(value) is not kind:
            self._refuse(name, value, words)
        return value

    def _refuse(self, name: str, value: object, words: str) -> NoReturn:
        raise invalid(f"{self._path}{name}", f"is {_kind(value)}; give {words}")


def is_ids(value: object) -> bool:
    """Whether it is a list of whole numbers."""
    return isinstance(value, list) and {*map(type, value)} <= {int}


def _kind(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return f"{str(value)[:80]!r} ({type(value).__name__})"


def _is_unicode(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:80]!r} is given twice")
    return found
