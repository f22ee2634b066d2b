"""What a corpus is to the tokenizer: files, each of which yields documents. The readers are plain_text.py, jsonl.py,
csv_rows.py and arrow_tables.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from parallel.errors import ConfigError


class DataError(ConfigError):
    """A corpus or a folder of tokens that is missing, unreadable, damaged, or not the one that was meant."""


class NothingHeldOut(DataError):
    """The part of a corpus that evaluations read is empty."""


@dataclass(frozen=True)
class Document:
    """One text to learn. Nothing is learned of `prompt`, which comes before it. `where` names it in an error;
    `consumed` of `file`.
    """

    text: str
    where: str
    prompt: str = ""
    consumed: float = 0.0  # the share of its file read so far, for progress


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus and its name relative to the corpus, which is what is recorded."""

    path: Path
    name: str


class Source(Protocol):
    """A corpus. Reading a file twice yields the same documents in the same order."""

    @property
    def files(self) -> tuple[SourceFile, ...]: ...

    @property
    def settings(self) -> Mapping[str, str | None]:
        """Everything but the files that decides which documents come out."""
        ...

    @property
    def has_prompts(self) -> bool: ...

    def documents(self, file: SourceFile) -> Iterator[Document]: ...
