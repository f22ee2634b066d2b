"""A tokenizer's fingerprint: a digest of what it makes of a fixed text, so that tokens are never mixed with those of
another.

The text is a few sentences in several scripts and some thousand pseudo-words, which between them use most short merges
of any vocabulary. It asks nothing of the tokenizer's files: the same tokenizer stored another way has the same
fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

SENTENCES = (
    "The quick brown fox jumps over the lazy dog; isn't 'twas 3.14159 == 22/7?\n\tdef f(x): return {x: [x ** 2]}  # "
    "0xFF\r\n",
    "親譲りの無鉄砲で小供の時から損ばかりしている。カタカナ、ｱｲｳ、１２３。",
    "Größe, naïve, łódź, Ελληνικά, русский, עברית, العربية, हिन्दी, 中文, 한국어, 😀👩‍👩‍👧.",
)
NUM_WORDS = 3000


class Tokenizer(Protocol):
    """What tokenizing a corpus needs. `encode` gives the ids of a text; an end-of-sequence id it may add is not added
    twice.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> Sequence[int]: ...


def pseudo_words(count: int) -> str:
    """Words of 1 to 8 letters drawn by a fixed linear congruential generator, by letter frequency in English; some
    capital, some kana.
    """
    alphabets = (
        "eeeeeetttttaaaaooooiiiinnnnsssshhhhrrrrddllccuummwwffggyyppbbvkjxqz",
        "あいうえおかきくけこさしすせそたちつてとなにのはまもやよらりるれをん",
    )
    state, words = 1, []
    for index in range(count):
        letters = alphabets[index % 8 == 7]
        word = []
        for _ in range(1 + index % 8):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            word.append(letters[(state >> 33) % len(letters)])
        words.append("".join(word).capitalize() if index % 5 == 0 else "".join(word))
    return " ".join(words)


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{tokenizer.vocab_size} {tokenizer.eos_token_id}".encode())
    for text in (*SENTENCES, pseudo_words(NUM_WORDS)):
        digest.update(b"\n" + " ".join(map(str, tokenizer.encode(text))).encode())
    return digest.hexdigest()
