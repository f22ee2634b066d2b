"""One sample's place in its grammar. It follows the sample's tokens by itself: whoever asks gives all of them, and it
takes in what it has not seen, or goes back to where they part. So a sample that is computed again, taken up from a
ledger, or goes on from another beam needs nothing but its tokens.

llguidance's matchers never raise: after a fault they allow the end of text alone. So each call is followed by a look
at its error, which is raised here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallel.errors import TpError

if TYPE_CHECKING:
    import llguidance

LONGEST_WORDS = 500
"""Characters of llguidance's about what is wrong: it draws whole grammars."""
WORDS = {"NoExtensionBias": "no token of this model goes on with it", "ParserTooComplex": "it is too complex to parse",
         "LexerTooComplex": "a regular expression in it is too complex"}  # fmt: skip
"""Its reasons that are a name alone."""
SLOW_S, PATIENCE_S = 0.02, 2.0
"""A sample whose masks take longer than this on average, and all together longer than that, is ended: a step waits for
them. An ordinary mask takes a thousandth of it."""


class GuideFault(TpError, RuntimeError):
    """What is the matter with one sample's grammar."""


@dataclass(frozen=True)
class Words:
    """How many tokens the model has, and whether one of them ends a text."""

    size: int
    ends: bool


@dataclass
class Costs:
    """Of all samples' masks so far, with following their tokens."""

    masks: int = 0
    seconds: float = 0.0


class Matcher:
    """A grammar after the tokens of one sample. Masks are words of 32 bits, bit i of word w is token 32 w + i."""

    def __init__(
        self, matcher: llguidance.LLMatcher, words: Words, prompt_len: int = 0, costs: Costs | None = None
    ) -> None:
        """`matcher` in its first state, from now on this one's; a sample's first `prompt_len` tokens are not its."""
        self._matcher, self._words, self._prompt_len = matcher, words, prompt_len
        self._all = costs or Costs()
        self._made: list[int] = []  # tokens it has taken in
        self._known: bytes | None = None  # the mask after these
        self._costs = Costs()

    def mask(self, tokens: Many[int]) -> bytes:
        """Which tokens may follow. Raises GuideFault where none may, or the grammar has become too large to follow."""
        self._follow(tokens)
        return self._mask()

    def ended(self, tokens: Many[int]) -> bool:
        """Whether nothing but an end can follow: the text is complete."""
        self._follow(tokens)
        if self._matcher.is_stopped():
            return True
        return not self._words.ends and self._matcher.is_accepting() and not any(self._masked())

    def allowed(self, tokens: Many[int], draft: Many[int]) -> list[int]:
        """The beginning of a draft that the grammar allows, before what ends a text and up to its completion."""
        self._follow(tokens)
        count, kept = self._matcher.validate_tokens([*draft]), 0
        for token in draft[:count]:
            if self._matcher.is_stopped() or not self._take([token]):
                break
            kept += 1
        stopped = self._matcher.is_stopped()
        self._go_back(kept)
        return [*draft[: kept - stopped]]

    def masks_along(self, tokens: Many[int], draft: Many[int]) -> list[bytes]:
        """The mask after the tokens, and after each of a draft that is allowed."""
        found = [self.mask(tokens)]
        for token in draft:
            self._take([token])
            found.append(self._mask())
        self._go_back(len(draft))
        return found

    def check_begins(self) -> None:
        """Raises GuideFault where no text at all follows the grammar."""
        self._mask()

    def _mask(self) -> bytes:
        found = self._masked()
        if not any(found):
            raise GuideFault("its grammar (structured_outputs) allows no token of this model here")
        return found

    def _masked(self) -> bytes:
        if self._known is None:
            began = time.perf_counter()
            found = self._matcher.compute_bitmask()
            self._check()
            self._known = found if self._words.ends else _cut(found, self._words.size)
            self._spent(began, 1)
        return self._known

    def _follow(self, tokens: Many[int]) -> None:
        made, known = tokens[self._prompt_len :], self._made
        same = len(known)
        if list(made[:same]) != known:
            same = next(i for i, token in enumerate(known) if i >= len(made) or made[i] != token)
            self._go_back(len(known) - same)
        if len(made) > same:
            began = time.perf_counter()
            self._take(made[same:])
            self._spent(began, 0)

    def _take(self, tokens: Many[int]) -> bool:
        taken = self._matcher.consume_tokens([*tokens])
        self._check()
        self._made += tokens
        self._known = None
        return bool(taken)

    def _go_back(self, count: int) -> None:
        if count:
            self._matcher.rollback(count)
            self._check()
            del self._made[-count:]
            self._known = None

    def _check(self) -> None:
        if self._matcher.is_error():
            words = self._matcher.get_error().removesuffix("<non-verbose/>").strip()[:LONGEST_WORDS]
            raise GuideFault(f"its grammar (structured_outputs) cannot be followed: {WORDS.get(words, words)}")

    def _spent(self, began: float, masks: int) -> None:
        seconds = time.perf_counter() - began
        for costs in (self._costs, self._all):
            costs.masks += masks
            costs.seconds += seconds
        tokens, total = self._costs.masks + len(self._made) + 1, self._costs.seconds
        if total > max(PATIENCE_S, SLOW_S * tokens):
            raise GuideFault(
                f"its grammar (structured_outputs) takes {1000 * total / tokens:.0f} ms for each token; at most "
                f"{1000 * SLOW_S:.0f} are allowed: give a simpler one"
            )


def _cut(mask: bytes, size: int) -> bytes:
    """The words of the first `size` tokens: without the end that the model does not have."""
    bits = int.from_bytes(mask, "little") & ((1 << size) - 1)
    return bits.to_bytes(-(-size // 32) * 4, "little")
