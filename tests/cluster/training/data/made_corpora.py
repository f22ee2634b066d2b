"""What the data tests share: a tokenizer whose ids are bytes, random corpora, and a folder of tokens made of a list of
texts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from cluster.training.data.corpus.sources import SourceOptions, open_source
from cluster.training.data.store.token_store import TokenStore
from cluster.training.data.store.tokenize_corpus import tokenize_corpus

EOS = 256


class ByteTokenizer:
    """UTF-8 bytes; 256 ends a text. `calls` counts the texts it was given."""

    def __init__(self, vocab_size: int = 257, shift: int = 0) -> None:
        self.vocab_size, self.shift, self.calls = vocab_size, shift, 0

    @property
    def eos_token_id(self) -> int:
        return EOS

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.calls += 1
        return [(byte + self.shift) % 256 for byte in text.encode()]


def random_texts(count: int, longest: int, seed: int = 0) -> list[str]:
    """Distinct texts of 1 to `longest` bytes (a number in front makes them distinct)."""
    rng = random.Random(seed)
    alphabet = "abcdefghijklmnopqrstuvwxyz "
    return [f"{number}{''.join(rng.choices(alphabet, k=rng.randrange(longest)))}" for number in range(count)]


def write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def store_of(folder: Path, texts: Sequence[str], prompts: Sequence[str] | None = None, shift: int = 0) -> TokenStore:
    """The tokens of some texts, in `folder`/tokens."""
    rows = [{"text": text} for text in texts]
    for row, prompt in zip(rows, prompts or (), strict=False):
        row["prompt"] = prompt
    folder.mkdir(parents=True, exist_ok=True)
    source = open_source(
        write_jsonl(folder / "corpus.jsonl", rows), SourceOptions(prompt_field="prompt" if prompts else None)
    )
    return tokenize_corpus(source, ByteTokenizer(shift=shift), folder / "tokens")
