"""What every token of a vocabulary stands for, as bytes, and a text as tokens whose bytes are exactly that text.

For whoever walks a vocabulary by bytes (guided decoding). A tokenizer may change what it reads: the Japanese one makes
株 of ㍿. Here such a text is spelled by the longest tokens that fit, so that bytes in are bytes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from parallel.errors import RequestError
from tp_decoders.text.tokenizer import Tokenizer


class TokenTable:
    """The tokens of a model with `vocab_size` of them. `pieces[id]` are a token's bytes: none of an id that the
    tokenizer does not have; `special_ids` are tokens that are no text, whatever their bytes, those that end one
    (`ends`) among them.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.ends = tuple(ends)
        self.pieces = tuple(tokenizer.vocabulary.token_bytes(i) or b"" for i in range(vocab_size))
        self.special_ids = frozenset(i for i in (*tokenizer.special_ids, *ends) if i < vocab_size)

    def spelled(self, text: str) -> list[int]:
        """Tokens of exactly these bytes, as far as the vocabulary has any: the tokenizer's own where they are."""
        data = text.encode()
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        except RequestError:
            ids = []
        known = all(i < len(self.pieces) and i not in self.special_ids for i in ids)
        return ids if known and b"".join(self.pieces[i] for i in ids) == data else self._longest(data)

    def _longest(self, data: bytes) -> list[int]:
        ids, place = [], 0
        while place < len(data):
            found = next((piece for end in range(min(len(data), place + self._most), place, -1)
                          if (piece := data[place:end]) in self._by_bytes), None)  # fmt: skip
            if found is None:
                break
            ids.append(self._by_bytes[found])
            place += len(found)
        return ids

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        """The lowest id of those with the same bytes."""
        ids = range(len(self.pieces) - 1, -1, -1)
        return {self.pieces[i]: i for i in ids if self.pieces[i] and i not in self.special_ids}

    @cached_property
    def _most(self) -> int:
        return max(map(len, self._by_bytes), default=0)


def token_table(tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int] = ()) -> TokenTable | None:
    """The table of a tokenizer; None where its tokens mean something together only. `ends`: ids of the model that end a
    text, by the checkpoint's files.
    """
    if any(tokenizer.vocabulary.token_bytes(i) is None for i in range(min(8, tokenizer.vocab_size, vocab_size))):
        return None
    return TokenTable(tokenizer, vocab_size, ends)
