"""`tokenize_corpus`: a corpus into a folder of tokens, once.

An interrupted run goes on where it stopped and ends with the same bytes as one that was not; a finished one is opened
again at once, as long as corpus and tokenizer are the same. Documents without text are left out and counted.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cluster.training.data.corpus.document import DataError, Document, Source
from cluster.training.data.store.token_store import FORMAT, META, TokenStore, file_digest, read_meta, token_dtype
from cluster.training.data.store.token_writer import TokenWriter, locked
from cluster.training.data.store.tokenizer_fingerprint import Tokenizer, tokenizer_fingerprint
from parallel.errors import ConfigError

log = logging.getLogger(__name__)
CHECKPOINT_TOKENS = 1 << 20


@dataclass(frozen=True)
class TokenizeProgress:
    """How far tokenizing is: files, bytes of the corpus, and what came out so far."""

    files_done: int
    files: int
    bytes_done: int
    bytes: int
    documents: int
    tokens: int


ProgressSink = Callable[[TokenizeProgress], None]


def log_progress(now: TokenizeProgress) -> None:
    """A line of the log."""
    share = 100 * now.bytes_done // max(1, now.bytes)
    log.info("tokenized %d %% of the corpus: %d documents, %d tokens", share, now.documents, now.tokens)


def tokenize_corpus(
    source: Source,
    tokenizer: Tokenizer,
    out_dir: str | Path,
    *,
    progress: ProgressSink = log_progress,
    checkpoint_tokens: int = CHECKPOINT_TOKENS,
) -> TokenStore:
    """Tokenize `source` into `out_dir`; `progress` is called at every checkpoint, that is about every
    `checkpoint_tokens` tokens.
    """
    out_dir = Path(out_dir)
    plan = corpus_plan(source, tokenizer)
    if out_dir.is_dir() and any(out_dir.iterdir()):
        return _finished(out_dir, plan)
    try:
        with locked(out_dir.with_name(out_dir.name + ".partial")) as partial:
            writer = TokenWriter(partial, plan, token_dtype(tokenizer.vocab_size), source.has_prompts)
            try:
                _Run(source, tokenizer, writer, checkpoint_tokens, progress).run(out_dir)
            finally:
                writer.close()
    except OSError as error:
        raise DataError(
            f"tokenizing into {out_dir} stopped: {error}; put that right and run it again: it goes on from there"
        ) from error
    return TokenStore.open(out_dir)


def corpus_plan(source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that decides what is written: the part of meta.json known beforehand."""
    eos = tokenizer.eos_token_id
    if eos is None or not 0 <= eos < tokenizer.vocab_size:
        raise ConfigError(
            f"the tokenizer's end-of-sequence id is {eos}; documents end with one: it must be below its vocabulary of "
            f"{tokenizer.vocab_size}"
        )
    identity = {
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": eos,
    }
    sources = [{"name": file.name} | file_digest(file.path) for file in source.files]
    return {"format": FORMAT, "tokenizer": identity, "source": dict(source.settings), "sources": sources}


def _finished(folder: Path, plan: dict[str, Any]) -> TokenStore:
    """An earlier run's result, if it is of the same plan."""
    if not (folder / META).is_file():
        raise ConfigError(f"{folder} is in use and holds no tokens; choose a new or empty folder")
    meta = read_meta(folder)
    differing = [key for key in plan if meta.get(key) != plan[key]]
    if differing:
        raise ConfigError(
            f"{folder} holds the tokens of another run (its {' and '.join(differing)} differ); choose another folder "
            "or remove it"
        )
    return TokenStore.open(folder)


def document_hash(document: Document) -> int:
    """64 bits of a document's text, the same for every tokenizer."""
    try:
        text = f"{document.prompt}\0{document.text}".encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{document.where} has a lone surrogate ({error.object[error.start]!a}), which no text can hold; mend it"
        ) from error
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class _Run:
    """One run of `tokenize_corpus`, from where the writer stands."""

    source: Source
    tokenizer: Tokenizer
    writer: TokenWriter
    checkpoint_tokens: int
    progress: ProgressSink

    def run(self, out_dir: Path) -> None:
        position = self.writer.position
        while position.file < len(self.source.files):
            self._file()
            position.file += 1
            position.documents_in_file = 0
            self._checkpoint(0.0)
        if position.documents == 0:
            raise DataError(
                f"{self.source.files[0].path} and the rest of the corpus have no text ({position.empty_documents} "
                "empty documents)"
            )
        self.writer.finish(out_dir)

    def _file(self) -> None:
        position, marked = self.writer.position, self.writer.position.tokens
        documents = self.source.documents(self.source.files[position.file])
        for document in islice(documents, position.documents_in_file, None):
            self._document(document)
            position.documents_in_file += 1
            if position.tokens - marked >= self.checkpoint_tokens:
                marked = position.tokens
                self._checkpoint(document.consumed)

    def _document(self, document: Document) -> None:
        digest = document_hash(document)
        ids = self._encode(document.text, document, whole=not document.prompt) if document.text.strip() else []
        if not ids:
            self.writer.position.empty_documents += 1
            return
        prompt = self._encode(document.prompt, document) if document.prompt else []
        self.writer.append([*prompt, *ids, self.tokenizer.eos_token_id or 0], digest, len(prompt))

    def _encode(self, text: str, document: Document, whole: bool = True) -> list[int]:
        """The ids of a text without the end-of-sequence that some tokenizers add; of one that goes on after a prompt
        (not `whole`), without the beginning as well.
        """
        ids = list(self.tokenizer.encode(text) if whole else self.tokenizer.encode(text, add_special_tokens=False))
        if not ids:
            return ids
        array = np.asarray(ids, np.int64)
        if array.min() < 0 or array.max() >= self.tokenizer.vocab_size:
            bad = int(array.max()) if array.min() >= 0 else int(array.min())
            raise DataError(
                f"{document.where}: the tokenizer gave id {bad}, outside its vocabulary of "
                f"{self.tokenizer.vocab_size}; its files do not belong together"
            )
        return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids

    def _checkpoint(self, share: float) -> None:
        self.writer.checkpoint()
        position, sizes = self.writer.position, [entry["bytes"] for entry in self.writer.plan["sources"]]
        current = int(share * sizes[position.file]) if position.file < len(sizes) else 0
        done = sum(sizes[: position.file]) + current
        self.progress(
            TokenizeProgress(position.file, len(sizes), done, sum(sizes), position.documents, position.tokens)
        )
