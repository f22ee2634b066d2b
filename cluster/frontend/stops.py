"""Stop strings over streamed text: matched across any cut of the text, and nothing shown that could still become one.

The rule, independent of how the text arrives: the stop string that is complete first ends the text; of two complete
at the same character the longer one counts. Knows characters only: no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Released:
    """Text that may be shown now, and the stop string that was hit, if any."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Holds back the longest tail of the text that is the beginning of some stop string."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str) -> Released:
        """Take more text; after a hit nothing more may be pushed."""
        text = self._held + text
        hit = self._first_hit(text)
        if hit is not None:
            start, end = hit
            self._held = ""
            return Released(text[: end if self._include else start], text[start:end])
        keep = self._tail_to_hold(text)
        cut = len(text) - keep
        self._held = text[cut:]
        return Released(text[:cut])

    def flush(self) -> str:
        """The text held back, once it is known that no more will come."""
        held, self._held = self._held, ""
        return held

    def _first_hit(self, text: str) -> tuple[int, int] | None:
        found = ((text.find(stop), len(stop)) for stop in self._stops)
        hits = [(start + length, start) for start, length in found if start >= 0]
        if not hits:
            return None
        end, start = min(hits)
        return start, end

    def _tail_to_hold(self, text: str) -> int:
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
