"""Token ids to text as they arrive, without ever showing half a character.

Where every token stands for bytes (byte-level BPE, the Japanese vocabulary), an incremental UTF-8 decoder does it.
Other tokenizers (byte fallback, sentence pieces) are decoded over a window of recent ids, and text that may still
change is held back. In both cases the pieces, `flush` included, add up to `tokenizer.decode` of all ids.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tp_decoders.text.tokenizer import Tokenizer

WINDOW = 128
OVERLAP = 32


class IncrementalDetokenizer:
    """One stream's text. `push` ids, take the text that is certain; `flush` once at the end."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []
        self._shown = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete."""
        kept = self._tokenizer.kept(ids, self._skip)
        pieces = [self._tokenizer.vocabulary.token_bytes(token_id) for token_id in kept]
        if any(piece is None for piece in pieces):
            return self._push_window(kept)
        return self._utf8.decode(b"".join(piece for piece in pieces if piece))

    def flush(self) -> str:
        """What was held back; bytes that never became a character are U+FFFD."""
        rest = self._tokenizer.vocabulary.decode(self._window)[self._shown :] if self._window else ""
        self._window, self._shown = [], 0
        return self._utf8.decode(b"", final=True) + rest

    def _push_window(self, ids: Sequence[int]) -> str:
        self._window.extend(ids)
        certain = self._tokenizer.vocabulary.decode_certain(self._window)
        fresh = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        if len(self._window) > WINDOW:
            self._shorten(certain)
        return fresh

    def _shorten(self, certain: str) -> None:
        """Forgets the older ids where the newer ones alone decode to the end of the same text."""
        recent = self._window[-OVERLAP:]
        alone = self._tokenizer.vocabulary.decode(recent)
        if certain.endswith(alone):
            self._window, self._shown = recent, len(alone)
