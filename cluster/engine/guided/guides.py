"""The grammars of one vocabulary: each compiled once, kept while it is among the last that were asked for.

A compiled grammar is a matcher in its first state, of which every sample takes a copy. What compiling and a mask may
cost at most are llguidance's own limits, in its units of work, so that it is the same on every machine. Used by the
front-end, to refuse what is wrong before it takes a place, and by rank 0. From any thread.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from cluster.engine.guided.grammar import grammar_text, library
from cluster.engine.guided.matcher import LONGEST_WORDS, Costs, GuideFault, Matcher, Words
from cluster.engine.request import Guide
from cluster.request_errors import InvalidRequest, NoGuides, Violation

if TYPE_CHECKING:
    import llguidance

MOST_COMPILED = 64
FIELD = "sampling.structured_outputs"
NO_TOKENS = (
    "this checkpoint has no tokenizer whose tokens each stand for bytes, so its answers cannot be held to a grammar; "
    "leave structured_outputs out"
)


class TokenTable(Protocol):
    """What the tokens of a vocabulary stand for (tp_decoders.text.token_table)."""

    @property
    def pieces(self) -> tuple[bytes, ...]: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text."""
        ...

    def spelled(self, text: str) -> list[int]: ...


Tables = Callable[[], TokenTable | None]
"""Read when it is first needed: a table of 50,000 tokens takes half a second. None: this vocabulary has none."""


class Guides:
    """`matcher(guide, ...)` for each sample. `seconds` and `compiles` count what was compiled so far."""

    def __init__(self, tables: Tables, most: int = MOST_COMPILED) -> None:
        self._tables, self._most = tables, most
        self._vocabulary: tuple[llguidance.LLTokenizer, Words] | None = None
        self._compiled: OrderedDict[Guide, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()  # never held while a grammar is compiled
        self.compiles, self.seconds = 0, 0.0
        self.masks = Costs()

    def known(self, guide: Guide) -> bool:
        """Whether it is compiled already."""
        return guide in self._compiled

    def matcher(self, guide: Guide, prompt_len: int) -> Matcher:
        """For one sample, from its first token on. Raises NoGuides, or InvalidRequest with llguidance's words."""
        first = self.compiled(guide)
        return Matcher(first.deep_copy(), self._opened()[1], prompt_len, self.masks)

    def compiled(self, guide: Guide) -> llguidance.LLMatcher:
        """The matcher in its first state; that a text can begin is known. Raises as `matcher`."""
        found = self._compiled.get(guide)
        if found is None:
            tokenizer, words = self._opened()
            began = time.perf_counter()
            found = _compile(guide, tokenizer, words)
            with self._lock:
                self.seconds += time.perf_counter() - began
                self.compiles += 1
        with self._lock:
            self._compiled[guide] = found
            self._compiled.move_to_end(guide)
            if len(self._compiled) > self._most:
                self._compiled.popitem(last=False)
        return found

    def _opened(self) -> tuple[llguidance.LLTokenizer, Words]:
        with self._lock:
            if self._vocabulary is None:
                library()
                table = self._tables()
                if table is None:
                    raise NoGuides(NO_TOKENS)
                self._vocabulary = _opened(table)
            return self._vocabulary


def _compile(guide: Guide, tokenizer: llguidance.LLTokenizer, words: Words) -> llguidance.LLMatcher:
    try:
        made = library()(tokenizer, grammar_text(guide), log_level=0, limits=_limits())
    except ValueError as error:
        raise _refused(guide, str(error)) from error
    if made.is_error():
        raise _refused(guide, made.get_error())
    try:
        Matcher(made.deep_copy(), words).check_begins()
    except GuideFault as fault:
        raise _refused(guide, str(fault)) from fault
    return made


class _Wrapper:
    """A table as llguidance takes it. Without a token that ends a text there is one more, which no model has."""

    bos_token_id = None

    def __init__(self, table: TokenTable) -> None:
        size = len(table.pieces)
        self.eos_token_id = table.ends[0] if table.ends else size
        self.tokens = table.pieces if table.ends else (*table.pieces, b"<end>")
        self.special_token_ids = sorted({*table.special_ids, self.eos_token_id})
        self._spelled = table.spelled

    def __call__(self, text: bytes) -> list[int]:
        return self._spelled(text.decode())


def _opened(table: TokenTable) -> tuple[llguidance.LLTokenizer, Words]:
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapper = _Wrapper(table)
    tokenizer = LLTokenizer(TokenizerWrapper(wrapper), eos_token=[*table.ends] or [wrapper.eos_token_id])
    return tokenizer, Words(len(table.pieces), bool(table.ends))


def _limits() -> llguidance.LLParserLimits:
    """llguidance's own, and errors that do not repeat the grammar."""
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)


def _refused(guide: Guide, words: str) -> InvalidRequest:
    return InvalidRequest.of([Violation(f"{FIELD}.{guide.kind}", words.strip()[:LONGEST_WORDS])])
