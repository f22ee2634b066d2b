"""Text that came from elsewhere, made safe for a log and for a terminal: what would end a line, steer a terminal or
turn the direction of writing is shown as an escape (\\n, \\x1b, \\u202e): no name can pass for a line of ours.

Formatters of plain logs are `PlainLines`; JSON has escapes of its own (cluster.json_logs). What a model writes for its
reader is no log: `for_terminal` keeps its lines and tabs.
"""

from __future__ import annotations

import logging
import re

CONTROL = "\x00-\x1f\x7f-\x9f"
TURNING = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
"""Marks, embeddings, overrides and isolates of bidirectional text (Unicode, UAX 9)."""
UNSAFE = re.compile(f"[{CONTROL}\u2028\u2029{TURNING}\ufeff\ud800-\udfff\U000e0000-\U000e007f]")
"""With line and paragraph separators, halves of characters, and tags, which are not seen."""
LINES = "\t\n"


def visible(text: object) -> str:
    """One line of it."""
    return UNSAFE.sub(_escaped, str(text))


def for_terminal(text: str) -> str:
    """As it is but for what a terminal would obey."""
    return UNSAFE.sub(lambda found: found[0] if found[0] in LINES else _escaped(found), text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


class PlainLines(logging.Formatter):
    """One line per record; below it, indented, the exception."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return visible(super().formatMessage(record))

    def formatException(self, ei: object) -> str:
        return indented(super().formatException(ei))  # type: ignore[arg-type]

    def formatStack(self, stack_info: str) -> str:
        return indented(stack_info)


def indented(text: str) -> str:
    """Lines that cannot be taken for records."""
    return "\n".join(f"    {visible(line)}" for line in text.split("\n"))
