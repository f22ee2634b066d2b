"""Tokens to text, one sample at a time: incremental detokenisation, then stop strings.

The tokenizer is a seam (`Tokenizer`, `Detokenizer`): the real one is tp_decoders.text.tokenizer's, tests bring their
own. A checkpoint without one has `codec=None` and then yields no text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

from cluster.engine.request import StoppingCriteria
from cluster.frontend.output.stop_strings import StopMatcher, StopStrings

if TYPE_CHECKING:
    from tp_decoders.text.token_table import TokenTable
    from tp_decoders.text.tokenizer import Tokenizer as CheckpointTokenizer


FIM_SPELLINGS = ("<fim_{}>", "<fim-{}>")  # StarCoder's, SantaCoder's


class Tokenizer(Protocol):
    """What a front-end needs of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; of a part of one, without what begins and ends every text, if that is False."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Detokenizer(Protocol):
    """Turns the tokens of one sample into text piece by piece; never half a character."""

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True)
class FimTokens:
    """The tokens that mark the parts of a fill-in-the-middle prompt."""

    prefix: int
    suffix: int
    middle: int


@dataclass(frozen=True, kw_only=True)
class TextCodec:
    """A tokenizer, how to make a detokenizer for one sample, and the model's fill-in-the-middle tokens if any."""

    tokenizer: Tokenizer
    detokenizer: Callable[[], Detokenizer]
    fim: FimTokens | None = None
    special_tokens: Mapping[int, str] = field(default_factory=dict)
    """Tokens that the detokenizer does not show, and how they are written."""
    first_ids: tuple[int, ...] = ()
    """What the tokenizer puts before every text."""
    table: Callable[[int, Sequence[int]], TokenTable | None] = lambda vocab_size, ends: None
    """What the tokens of a model stand for, some of which end a text."""


def codec_of(tokenizer: CheckpointTokenizer | None) -> TextCodec | None:
    """The codec of a checkpoint's tokenizer; None where it has none."""
    if tokenizer is None:
        return None
    from tp_decoders.text.detokenizer import IncrementalDetokenizer
    from tp_decoders.text.token_table import token_table

    fim = fim_tokens(tokenizer.vocabulary.find)
    return TextCodec(
        tokenizer=tokenizer,
        detokenizer=partial(IncrementalDetokenizer, tokenizer),
        fim=fim,
        special_tokens=tokenizer.special_tokens,
        first_ids=tokenizer.first_ids,
        table=partial(token_table, tokenizer),
    )


def fim_tokens(find: Callable[[str], int | None]) -> FimTokens | None:
    """The tokens by their spelling in the vocabulary; None unless all three are there."""
    for spelling in FIM_SPELLINGS:
        prefix, suffix, middle = (find(spelling.format(part)) for part in ("prefix", "suffix", "middle"))
        if prefix is not None and suffix is not None and middle is not None:
            return FimTokens(prefix, suffix, middle)
    return None


@dataclass(frozen=True)
class Piece:
    """What some new tokens amount to: how many of them count, the text to show, and the stop string that ended the
    sample.
    """

    num_tokens: int
    text: str = ""
    stop: str | None = None


class SampleText:
    """The text of one sample. Stop strings count from the first token after min_new_tokens on."""

    def __init__(self, codec: TextCodec | None, stopping: StoppingCriteria, stops: StopStrings | None = None) -> None:
        """`stops`: those of `stopping`, where they have been prepared for several samples."""
        self._detokenizer = codec.detokenizer() if codec else None
        self._special = codec.special_tokens if codec else {}
        stops = stop_strings(codec, stopping) if stops is None else stops
        self._stops = StopMatcher(stops, stopping.include_stop_sequence) if stopping.stop_sequences else None
        self._free_tokens = stopping.min_new_tokens

    def push(self, token_ids: Sequence[int]) -> Piece:
        """Take new tokens; those after the one that completes a stop string do not count."""
        if self._detokenizer is None:
            return Piece(len(token_ids))
        if self._stops is None:
            return Piece(len(token_ids), self._detokenizer.push(token_ids))
        texts = []
        for count, token_id in enumerate(token_ids, start=1):
            text, stop = self._match(self._detokenizer.push((token_id,)), token_id)
            texts.append(text)
            if stop is not None:
                return Piece(count, "".join(texts), stop)
        return Piece(len(token_ids), "".join(texts))

    def finish(self) -> Piece:
        """What was held back, now that no more tokens will come."""
        if self._detokenizer is None:
            return Piece(0)
        rest = self._detokenizer.flush()
        if self._stops is None:
            return Piece(0, rest)
        released = self._stops.push(rest)
        return Piece(0, released.text + self._stops.flush(), released.stop)

    def _match(self, text: str, token_id: int) -> tuple[str, str | None]:
        """What a token adds to the text, which may be a special token that is not shown."""
        assert self._stops is not None, "only called with stop strings"
        if self._free_tokens:
            self._free_tokens -= 1
            return text, None
        released = self._stops.push(text)
        if released.stop is None and self._stops.looks_at_hidden and token_id in self._special:
            more = self._stops.push(self._special[token_id], hidden=True)
            return released.text + more.text, more.stop
        return released.text, released.stop


def stop_strings(codec: TextCodec | None, stopping: StoppingCriteria) -> StopStrings:
    """What the samples of a prompt stop at."""
    return StopStrings(stopping.stop_sequences, codec.special_tokens.values() if codec else ())
