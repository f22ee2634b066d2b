"""How long steps take, by what is in them: so that a step that callers share is not made much longer by one of them.

The time of a step grows with its decoding rows and with the prompt tokens it reads; how much is a matter of model and
machine. Here it is measured as it happens: the last few times of steps of 1, 2, 3-4, 5-8, ... rows without a prompt,
and what 1, 2, 3-4, ... prompt tokens added. A size that was never seen is tried one size above the largest that was
short enough.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

ENOUGH = 3
"""Times of a size before it counts as known."""
KEPT = 15
FRESH_SECONDS = 60.0
"""Older times are of another load, or another mood of the machine."""
UNKNOWN_PROMPT = 128
"""Prompt tokens of a step while nothing is known of steps without any."""


class Times:
    """Seconds by size; sizes are rounded up to powers of two."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[int, deque[float]] = {}
        self._last: dict[int, float] = {}

    def add(self, size: int, seconds: float) -> None:
        power = _power(size)
        self._seen.setdefault(power, deque(maxlen=KEPT)).append(seconds)
        self._last[power] = self._clock()

    def known(self, size: int) -> float | None:
        """The median of the last times; None where there are too few, or only old ones."""
        power = _power(size)
        seen = self._seen.get(power)
        if seen is not None and self._clock() - self._last[power] > FRESH_SECONDS:
            seen.clear()
        return None if seen is None or len(seen) < ENOUGH else statistics.median(seen)

    def largest(self, least: int, seconds: float, most: int) -> int:
        """The largest size from `least` on that takes no longer; the first that is not known is worth a try."""
        found = least
        while found < most:
            larger = 1 << (_power(found) + 1) if found == 1 << _power(found) else 1 << _power(found)
            took = self.known(larger)
            if took is not None and took > seconds:
                break
            found = larger
            if took is None:
                break
        return min(found, most)


class StepTime:
    """`stretch`: how many times as long as its shortest a step may take that callers share."""

    def __init__(self, stretch: float, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._more, self._max_tokens = (stretch - 1.0) / 2.0, max_tokens  # half for rows, half for prompts
        self._rows, self._prompts = Times(clock), Times(clock)
        self._shortest: float | None = None

    def took(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        """A step is over."""
        if not prompt_tokens:
            self._rows.add(rows, seconds)
            return
        alone = self._rows.known(rows) if rows else 0.0
        if alone is not None:
            self._prompts.add(prompt_tokens, max(0.0, seconds - alone))

    def rows(self, least: int) -> int:
        """Decoding rows of a step, `least` or more; as few as that until it is known how long so few take."""
        self._shortest = self._rows.known(least)
        if self._shortest is None:
            return least
        return self._rows.largest(least, self._shortest * (1.0 + self._more), self._max_tokens)

    def prompt_tokens(self, rows: int) -> int:
        """Prompt tokens beside `rows` rows; none for a moment, where the rows' own time is to be found out."""
        if rows and self._rows.known(rows) is None:
            return 0
        base = self._base(rows)
        return UNKNOWN_PROMPT if base is None else self._prompts.largest(16, base * self._more, self._max_tokens)

    def burst(self, rows: int) -> int:
        """What flows that have saved some up may have of them in one step, together: the step takes as long again."""
        base = self._base(rows)
        return UNKNOWN_PROMPT if base is None else self._prompts.largest(16, base, self._max_tokens)

    def _base(self, rows: int) -> float | None:
        return self._shortest or (self._rows.known(rows) if rows else None) or self._rows.known(1)


def _power(size: int) -> int:
    return max(0, size - 1).bit_length()
