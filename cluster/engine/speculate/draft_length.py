"""How many tokens of a sequence are worth a draft, by how its last drafts fared.

    all right          as many again and one more, up to the most     3, 7
    some right         one more than were right
    none right         one, and not at once: after 1, 3, 7, ... MOST_PAUSE steps

So text that does not repeat costs a wrong row every MOST_PAUSE steps, and text that does has all it can.
"""

from __future__ import annotations

FIRST = 3
"""Tokens of a sequence's first draft."""
MOST_PAUSE = 31
"""Steps without a draft after many misses in a row."""


class DraftLength:
    """One sequence's."""

    __slots__ = ("_length", "_misses", "_most", "_pause")

    def __init__(self, most: int) -> None:
        self._most, self._length = most, min(FIRST, most)
        self._misses = self._pause = 0

    def next(self) -> int:
        """Tokens of this step's draft; to be asked once a step."""
        if self._pause:
            self._pause -= 1
            return 0
        return self._length

    def settle(self, drafted: int, accepted: int) -> None:
        """How a draft fared."""
        if not accepted:
            self._misses += 1
            self._length, self._pause = 1, min(MOST_PAUSE, (1 << self._misses) - 1)
            return
        self._misses = 0
        grown = 2 * self._length + 1 if accepted == drafted else accepted + 1
        self._length = min(self._most, grown)
