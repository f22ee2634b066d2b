"""Where the end of one text occurred before in another, or in itself: the longest match among the latest places.

Every run of `size` tokens is kept with the place where it ended last, and each place with the one before it: reading a
token costs one look-up, and a search looks at no more than a few places and a few tokens before each.

    text    ... the cat sat on | the cat            tail: "the cat", found before "sat": sat on ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_PLACES = 8
"""Places of a run that one search compares, the latest first."""
MOST_MATCHED = 32
"""Tokens that are compared; a longer match is no better."""
MOST_READ = 1 << 15
"""Tokens of the end of a text that are read when the index is made."""


@dataclass(frozen=True, slots=True)
class Match:
    """The text's `length` tokens before `end` are the tail's last ones."""

    end: int
    length: int


class NGramIndex:
    """Runs of `size` tokens of a text that may only grow; the text stays its owner's."""

    def __init__(self, text: Sequence[int], size: int) -> None:
        self._text, self._size = text, size
        self._first = self._next = max(0, len(text) - MOST_READ) + size  # where runs end: the first, the next one
        self._last: dict[tuple[int, ...], int] = {}
        self._before: list[int] = []  # of the run that ends at _first + i: where it ended before, 0 for nowhere

    def read(self, stop: int) -> None:
        """Takes in the runs that end at or before `stop`."""
        for end in range(self._next, stop + 1):
            run = tuple(self._text[end - self._size : end])
            self._before.append(self._last.get(run, 0))
            self._last[run] = end
        self._next = max(self._next, stop + 1)

    def longest(self, tail: Sequence[int]) -> Match | None:
        """The longest match of the tail's end, the latest of equals; None where not even `size` tokens match."""
        end, best = self._last.get(tuple(tail[-self._size :]), 0), None
        for _ in range(MOST_PLACES):
            if not end:
                break
            length = self._matched(tail, end)
            if best is None or length > best.length:
                best = Match(end, length)
            if length >= MOST_MATCHED:
                break
            end = self._before[end - self._first]
        return best

    def _matched(self, tail: Sequence[int], end: int) -> int:
        """How many tokens before `end` are the tail's last ones; the first `size` are known to be."""
        length, most, text, stop = self._size, min(MOST_MATCHED, end, len(tail)), self._text, len(tail)
        while length < most and text[end - length - 1] == tail[stop - length - 1]:
            length += 1
        return length
