"""Stop strings over streamed text: matched across any cut of the text, and nothing shown that could still become one.

The rule, independent of how the text arrives: the stop string that is complete first ends the text; of two complete
at the same character the longer one counts. Knows characters only: no tokens.

Text may have hidden parts: special tokens, which are spelled out for stop strings that name one and never shown (but
as part of the stop string that ended the text, where that is asked for). Other stop strings are looked for in what is
shown.

    arrives   a b <|end|> c      shown   a b c      stops   "b<|end|>": all of it,  "bc": what is shown
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Released:
    """Text that may be shown now, and the stop string that was hit, if any."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Holds back the longest tail of the text that is the beginning of some stop string."""

    def __init__(self, stops: Sequence[str], include: bool = False, hidden: Collection[str] = ()) -> None:
        """`hidden` are the texts of which hidden parts consist."""
        naming = {stop for stop in stops if any(text in stop for text in hidden)}
        self._plain = tuple(stop for stop in stops if stop not in naming)
        self._naming = tuple(naming)
        self._include = include
        self._held = ""
        self._hidden: set[int] = set()  # places in what is held

    @property
    def looks_at_hidden(self) -> bool:
        """Whether hidden parts mean anything here."""
        return bool(self._naming)

    def push(self, text: str, hidden: bool = False) -> Released:
        """Take more text; after a hit nothing more may be pushed."""
        before = len(self._held)
        text = self._held + text
        if hidden:
            self._hidden.update(range(before, len(text)))
        shown = [i for i in range(len(text)) if i not in self._hidden] if self._hidden else range(len(text))
        hit = self._first_hit(text, shown)
        if hit is not None:
            _, start, stop = hit
            visible = self._visible(text, shown, start)
            self._held, self._hidden = "", set()
            return Released(visible + stop if self._include else visible, stop)
        cut = self._cut(text, shown)
        visible = self._visible(text, shown, cut)
        self._held, self._hidden = text[cut:], {i - cut for i in self._hidden if i >= cut}
        return Released(visible)

    def flush(self) -> str:
        """The text held back, once it is known that no more will come."""
        held = "".join(character for i, character in enumerate(self._held) if i not in self._hidden)
        self._held, self._hidden = "", set()
        return held

    def _visible(self, text: str, shown: Sequence[int], end: int) -> str:
        return "".join(text[i] for i in shown if i < end) if self._hidden else text[:end]

    def _first_hit(self, text: str, shown: Sequence[int]) -> tuple[int, int, str] | None:
        """End, start and stop string, as places in the text."""
        visible = self._visible(text, shown, len(text))
        found = ((visible.find(stop), stop) for stop in self._plain)
        hits = [(shown[at + len(stop) - 1] + 1, shown[at], stop) for at, stop in found if at >= 0]
        named = ((text.find(stop), stop) for stop in self._naming)
        hits += [(at + len(stop), at, stop) for at, stop in named if at >= 0]
        return min(hits, default=None)

    def _cut(self, text: str, shown: Sequence[int]) -> int:
        """From where on the text may still become a stop string."""
        visible = self._visible(text, shown, len(text))
        kept = _tail(visible, self._plain)
        plain = shown[len(visible) - kept] if kept else len(text)
        return min(plain, len(text) - _tail(text, self._naming))


def _tail(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of the text with which a stop string begins."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(stop.startswith(tail) for stop in stops):
            return length
    return 0
