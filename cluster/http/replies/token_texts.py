"""Tokens and their log-probabilities as OpenAI's two forms have them: four parallel lists, or an entry for each token.

Numbers are told as they are: a float32 widened to double, so that equal ones are equal after JSON; -inf, which JSON
does not have, is -9999. A token that is no text by itself is written as its bytes ("bytes:\\xe3\\x81"), so that two
halves of characters do not become one key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cluster.engine.request import TokenLogprobs
from cluster.frontend.output.output_text import TextCodec

NO_CHANCE = -9999.0


class TokenTexts:
    """How tokens are written."""

    def __init__(self, codec: TextCodec | None, names_are_ids: bool = False) -> None:
        self._codec, self._ids = codec, names_are_ids or codec is None

    def name(self, token_id: int) -> str:
        if self._ids:
            return f"token_id:{token_id}"
        data = self.bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def bytes(self, token_id: int) -> bytes:
        return b"" if self._codec is None else self._codec.tokenizer.token_bytes(token_id)

    def legacy(self, ids: Sequence[int], entries: Sequence[TokenLogprobs | None], offset: int = 0) -> dict[str, Any]:
        """Of tokens with an entry each (None: the first of a prompt), whose text begins at `offset`."""
        tokens = [self.name(token_id) for token_id in ids]
        offsets = []
        for token_id, name in zip(ids, tokens, strict=True):
            offsets.append(offset)
            offset += len(name) if not name.startswith(("bytes:", "token_id:")) else self._width(token_id)
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else finite(entry.logprob) for entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def chat(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """One object for each token."""
        content = [
            {**self._one(e.token_id, e.logprob), "top_logprobs": [self._one(i, value) for i, value in e.top]}
            for e in entries
        ]
        return {"content": content, "refusal": None}

    def prompt(self, entries: Sequence[TokenLogprobs]) -> list[Any]:
        """vLLM's: for each token of the prompt the likeliest and its own, by id; nothing for the first."""
        return [None, *map(self._ranked, entries)]

    def _ranked(self, entry: TokenLogprobs) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for rank, (token_id, value) in enumerate(entry.top, start=1):
            found[str(token_id)] = {"logprob": finite(value), "rank": rank, "decoded_token": self.name(token_id)}
        own = {"logprob": finite(entry.logprob), "rank": None, "decoded_token": self.name(entry.token_id)}
        found.setdefault(str(entry.token_id), own)
        return found

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """From the least likely up: where two are written alike, the likelier stays; the token itself always does."""
        found = {self.name(token_id): finite(value) for token_id, value in reversed(tuple(entry.top))}
        found.setdefault(self.name(entry.token_id), finite(entry.logprob))
        return found

    def _one(self, token_id: int, value: float) -> dict[str, Any]:
        return {"token": self.name(token_id), "logprob": finite(value), "bytes": list(self.bytes(token_id))}

    def _width(self, token_id: int) -> int:
        return len(self.bytes(token_id).decode("utf-8", "replace"))


def finite(value: float) -> float:
    return value if math.isfinite(value) else NO_CHANCE
