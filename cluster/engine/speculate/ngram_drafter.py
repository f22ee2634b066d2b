"""Drafts out of text that is there already: the request's own, and what its caller was answered lately.

What followed the longest earlier occurrence of the sequence's end is likely to follow again, where text is edited,
copied, listed or wrapped in the same words. A caller's answers serve that caller's requests alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Many

from cluster.engine.engine_config import SpeculationConfig
from cluster.engine.sequences.sequence import Sequence
from cluster.engine.speculate.ngram_index import Match, NGramIndex

SEPARATOR = -1
"""Stands after each answer; no token."""
MOST_CALLERS = 32
"""Callers whose answers are kept, those heard of last."""


class NGramDrafter:
    """Looks the last tokens up in the sequence's own text and in its caller's recent answers; the longer match wins."""

    def __init__(self, config: SpeculationConfig) -> None:
        self._config = config
        self._own: dict[Sequence, NGramIndex] = {}
        self._recent: OrderedDict[tuple[str, str], RecentAnswers] = OrderedDict()

    def propose(self, seq: Sequence, most: int) -> Many[int]:
        """No more tokens than have matched."""
        text = seq.tokens
        own = self._own.get(seq)
        if own is None:
            own = self._own[seq] = NGramIndex(text, self._config.prompt_lookup_min)
        own.read(len(text) - 1)  # not the tail itself
        mine, recent = own.longest(text), self._recent.get(_caller(seq))
        theirs = None if recent is None else recent.index.longest(text)
        if theirs is not None and recent is not None and (mine is None or theirs.length > mine.length):
            return following(recent.text, theirs, most)
        return () if mine is None else following(text, mine, most)

    def ended(self, seq: Sequence) -> None:
        self._own.pop(seq, None)
        answer = seq.tokens[seq.prompt_len :]
        if not self._config.recent_tokens or len(answer) <= self._config.prompt_lookup_min:
            return
        recent = self._recent.pop(_caller(seq), None) or RecentAnswers(self._config)
        recent.add(answer)
        self._recent[_caller(seq)] = recent
        if len(self._recent) > MOST_CALLERS:
            self._recent.popitem(last=False)


class RecentAnswers:
    """The last answers of one caller: at most twice `recent_tokens` of them."""

    def __init__(self, config: SpeculationConfig) -> None:
        self._config = config
        self.text: list[int] = []
        self.index = NGramIndex(self.text, config.prompt_lookup_min)

    def add(self, answer: list[int]) -> None:
        most = self._config.recent_tokens
        if len(self.text) + len(answer) >= 2 * most:
            self.text = self.text[-most:]
            self.index = NGramIndex(self.text, self._config.prompt_lookup_min)
        self.text += [*answer[: most - 1], SEPARATOR]
        self.index.read(len(self.text))


def following(text: Many[int], match: Match, most: int) -> list[int]:
    """What stands after a match; where the text ends, what it repeats goes on repeating."""
    found: list[int] = []
    for place in range(match.end, match.end + min(most, match.length)):
        token = text[place] if place < len(text) else found[place - len(text)]
        if token == SEPARATOR:
            break
        found.append(token)
    return found


def _caller(seq: Sequence) -> tuple[str, str]:
    share = seq.answer.request.share
    return share.caller, share.part
