"""GPT-NeoX-Japanese's sub-words (vocab.txt + emoji.json), encoded by transformers' own class with the settings of the
files beside them. Decoding is by bytes, so that a character spelled in bytes comes out whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

FILES = ("vocab.txt", "emoji.json")


class JapaneseVocabulary:
    """<|byteN|> is a byte of a character; tags are spaces, lines and emoji."""

    TAGS: ClassVar[dict[str, str]] = {
        "<SP>": " ",
        "<BR>": "\n",
        "<TAB>": "\t",
        "<BLOCK>": "▀",
        "<KIGOU>": "ǀ",
        "<U2000U2BFF>": "‖",
    }

    def __init__(self, folder: Path) -> None:
        from transformers import GPTNeoXJapaneseTokenizer  # only this kind needs transformers, which is slow to import

        self._tokenizer = GPTNeoXJapaneseTokenizer.from_pretrained(str(folder), local_files_only=True)
        self._words = self._tokenizer.ids_to_tokens
        self._emoji: dict[str, str] = self._tokenizer.emoji["emoji_inv"]
        self._added = {i: token.content for i, token in self._tokenizer.added_tokens_decoder.items()}
        ids = frozenset(self._tokenizer.all_special_ids)
        self.special_tokens: Mapping[int, str] = {i: self._added.get(i) or self._words[i][0] for i in ids}
        self.first_ids: tuple[int, ...] = ()
        self.eos_token: str | None = self._tokenizer.eos_token
        self.size = max([*self._words, *self._added]) + 1

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        if token_id not in self._words:
            return b""
        word = self._words[token_id][0]
        if word.startswith("<|byte") and word.endswith("|>"):
            return bytes([int(word[6:-2])])
        return str(self.TAGS.get(word) or self._emoji.get(word) or word).encode()

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    decode_certain = decode  # never asked for: every token stands for bytes

    def find(self, token: str) -> int | None:
        found = self._tokenizer.added_tokens_encoder.get(token, self._tokenizer.vocab.get(token))
        return None if found is None else int(found)
