"""Stop strings over streamed text: matched across any cut of the text, and nothing shown that could still become one.

The rule, independent of how the text arrives: the stop string that is complete first ends the text; of two complete
at the same character the longer one counts. Knows characters only: no tokens.

Text may have hidden parts: special tokens, which are spelled out for stop strings that name one and never shown (but
as part of the stop string that ended the text, where that is asked for). Other stop strings are looked for in what is
shown.

    arrives   a b <|end|> c      shown   a b c      stops   "b<|end|>": all of it,  "bc": what is shown
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Released:
    """Text that may be shown now, and the stop string that was hit, if any."""

    text: str
    stop: str | None = None


class Strings:
    """Strings to be found: for each the length of the longest beginning that is also the end of each of its beginnings
    (Knuth, Morris and Pratt 1977).
    """

    def __init__(self, strings: Collection[str]) -> None:
        self.strings = tuple(strings)
        self.by_first: dict[str, list[int]] = {}
        for place, string in enumerate(self.strings):
            self.by_first.setdefault(string[0], []).append(place)
        self._borders: dict[int, list[int]] = {}

    def step(self, matched: dict[int, int], character: str) -> dict[int, int]:
        """By string how many of its characters stand at the text's end, with one character more. Costs as many steps
        as strings of which a part stands there.
        """
        if not matched and character not in self.by_first:
            return matched
        longer = dict.fromkeys(self.by_first.get(character, ()), 1)
        for place, length in matched.items():
            if count := self._after(place, length, character):
                longer[place] = count
        return longer

    def complete(self, matched: Mapping[int, int]) -> int:
        """The length of the longest string that stands at the text's end; 0 where none does."""
        return max((length for place, length in matched.items() if length == len(self.strings[place])), default=0)

    def _after(self, place: int, matched: int, character: str) -> int:
        string = self.strings[place]
        while matched and string[matched] != character:
            matched = self._borders_of(place)[matched - 1]
        return matched + (string[matched] == character)

    def _borders_of(self, place: int) -> list[int]:
        """Made when a match of several characters breaks off for the first time."""
        borders = self._borders.get(place)
        if borders is None:
            string, borders = self.strings[place], [0]
            for character in string[1:]:
                length = borders[-1]
                while length and string[length] != character:
                    length = borders[length - 1]
                borders.append(length + (string[length] == character))
            self._borders[place] = borders
        return borders


class StopStrings:
    """A call's stop strings, prepared once for all of its samples. `hidden` are the texts of which hidden parts
    consist: strings that name one are looked for in all of the text, the others in what is shown.
    """

    def __init__(self, stops: Sequence[str], hidden: Collection[str] = ()) -> None:
        naming = {stop for stop in stops if any(text in stop for text in hidden)}
        self.plain = Strings({stop for stop in stops if stop not in naming})
        self.naming = Strings(naming)


class StopMatcher:
    """Holds back the longest tail of the text that is the beginning of some stop string."""

    def __init__(self, stops: StopStrings, include: bool = False) -> None:
        self._stops, self._include = stops, include
        self._held = ""
        self._shown: list[bool] = []  # by character of what is held
        self._plain: dict[int, int] = {}
        self._naming: dict[int, int] = {}

    @property
    def looks_at_hidden(self) -> bool:
        """Whether hidden parts mean anything here."""
        return bool(self._stops.naming.strings)

    def push(self, text: str, hidden: bool = False) -> Released:
        """Take more text; after a hit nothing more may be pushed."""
        stops, before = self._stops, len(self._held)
        text = self._held + text
        self._shown += [not hidden] * (len(text) - before)
        for place in range(before, len(text)):
            if not hidden:
                self._plain = stops.plain.step(self._plain, text[place])
            self._naming = stops.naming.step(self._naming, text[place])
            shown_stop = 0 if hidden else stops.plain.complete(self._plain)
            named_stop = stops.naming.complete(self._naming)
            if shown_stop or named_stop:
                return self._hit(text, place + 1, shown_stop, named_stop)
        cut = self._start(len(text), max(self._plain.values(), default=0), max(self._naming.values(), default=0))
        visible = self._visible(text, cut)
        self._held, self._shown = text[cut:], self._shown[cut:]
        return Released(visible)

    def flush(self) -> str:
        """The text held back, once it is known that no more will come."""
        visible = self._visible(self._held, len(self._held))
        self._held, self._shown = "", []
        return visible

    def _hit(self, text: str, end: int, plain: int, naming: int) -> Released:
        """The text before the longer of two stop strings that end here, of so many characters."""
        named, start = end - naming, self._start(end, plain, naming)
        stop = text[named:end] if naming and start == named else self._visible(text, end)[-plain:]
        visible = self._visible(text, start)
        self._held, self._shown = "", []
        return Released(visible + stop if self._include else visible, stop)

    def _start(self, end: int, plain: int, naming: int) -> int:
        """The first of the places from which `plain` shown and `naming` characters of any kind lead to `end`."""
        start = end
        if plain:
            all_shown = all(self._shown[:end])
            start = end - plain if all_shown else [i for i in range(end) if self._shown[i]][-plain]
        return min(start, end - naming)

    def _visible(self, text: str, end: int) -> str:
        """What is shown of the text up to there."""
        if all(self._shown[:end]):
            return text[:end]
        return "".join(character for character, shown in zip(text[:end], self._shown, strict=False) if shown)
