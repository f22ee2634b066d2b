"""A folder of tokens, memory-mapped: what tokenize_corpus.py wrote and everything after it reads.

    meta.json       tokenizer, sources with sizes and hashes, counts, and the size and SHA-256 of each file below
    tokens.bin      the ids of all documents, one after the other, each ending with end-of-sequence (uint16 or uint32)
    documents.bin   where each document starts, and the end of the last (uint64, documents + 1)
    hashes.bin      64 bits of each document's text, which decide the split (uint64, documents)
    prompts.bin     how many tokens of each document are its prompt (uint32, documents); only if the corpus has prompts

All numbers are little-endian. Opening checks sizes and structure; `verify` reads everything and compares the hashes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.training.data.corpus.document import DataError

FORMAT = "tp-decoders tokens, version 1"
META, TOKENS, DOCUMENTS, HASHES, PROMPTS = "meta.json", "tokens.bin", "documents.bin", "hashes.bin", "prompts.bin"
AGAIN = "tokenize the corpus again"


def token_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def file_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


@dataclass(frozen=True, eq=False)
class TokenStore:
    """An open folder of tokens. The arrays are memory-mapped."""

    folder: Path
    meta: dict[str, Any]
    tokens: NDArray[np.integer]
    starts: NDArray[np.uint64]
    hashes: NDArray[np.uint64]
    prompts: NDArray[np.uint32] | None

    @staticmethod
    def open(folder: str | Path, verify: bool = False) -> TokenStore:
        """Open a folder of tokens; `verify` also reads every file and compares its hash."""
        folder = Path(folder)
        meta = read_meta(folder)
        files: dict[str, dict[str, Any]] = meta["files"]
        for name, expected in files.items():
            _check_file(folder / name, expected, verify)
        dtypes = {TOKENS: meta["dtype"], DOCUMENTS: "uint64", HASHES: "uint64", PROMPTS: "uint32"}
        arrays = {name: _mapped(folder / name, np.dtype(dtypes[name]).newbyteorder("<")) for name in files}
        store = TokenStore(folder, meta, arrays[TOKENS], arrays[DOCUMENTS], arrays[HASHES], arrays.get(PROMPTS))
        store._check_structure()
        return store

    def _check_structure(self) -> None:
        documents, tokens = self.num_documents, self.num_tokens
        lengths = {
            DOCUMENTS: (len(self.starts), documents + 1),
            HASHES: (len(self.hashes), documents),
            TOKENS: (len(self.tokens), tokens),
        }
        if self.prompts is not None:
            lengths[PROMPTS] = (len(self.prompts), documents)
        for name, (found, expected) in lengths.items():
            if found != expected:
                raise DataError(f"{self.folder / name} has {found} entries where {META} counts {expected}; {AGAIN}")
        if (
            documents == 0
            or self.starts[0] != 0
            or self.starts[-1] != tokens
            or not (self.starts[1:] > self.starts[:-1]).all()
        ):
            raise DataError(
                f"{self.folder / DOCUMENTS} does not divide {tokens} tokens into {documents} documents; it is "
                f"damaged: {AGAIN}"
            )

    @property
    def num_documents(self) -> int:
        return int(self.meta["counts"]["documents"])

    @property
    def num_tokens(self) -> int:
        return int(self.meta["counts"]["tokens"])

    @property
    def vocab_size(self) -> int:
        return int(self.meta["tokenizer"]["vocab_size"])

    @property
    def tokenizer_fingerprint(self) -> str:
        return str(self.meta["tokenizer"]["fingerprint"])

    @property
    def digest(self) -> str:
        """The identity of the tokens themselves, whatever corpus they came from."""
        text = json.dumps(self.meta["files"], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens at some places, checked against the vocabulary."""
        ids = self.tokens[indices].astype(np.int64)
        if len(ids) and int(ids.max()) >= self.vocab_size:
            at = int(indices[ids.argmax()])
            raise DataError(
                f"{self.folder / TOKENS} has id {int(ids.max())} at {at}, beyond the vocabulary of {self.vocab_size}; "
                f"it is damaged: {AGAIN}"
            )
        return ids


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a folder of tokens, checked for what is read of it."""
    path = folder / META
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a folder made by tokenizing a corpus")
    try:
        meta: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _check_meta(meta, path)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {AGAIN}") from error
    return meta


def _check_meta(meta: dict[str, Any], path: Path) -> None:
    if meta["format"] != FORMAT:
        raise DataError(f"{path} is of format {meta['format']!r}, not {FORMAT!r}; {AGAIN}")
    if meta["dtype"] != token_dtype(int(meta["tokenizer"]["vocab_size"])):
        raise DataError(
            f"{path}: dtype {meta['dtype']!r} does not hold a vocabulary of {meta['tokenizer']['vocab_size']}; {AGAIN}"
        )
    if not {TOKENS, DOCUMENTS, HASHES} <= set(meta["files"]) <= {TOKENS, DOCUMENTS, HASHES, PROMPTS}:
        raise DataError(f"{path} lists the files {sorted(meta['files'])}; {AGAIN}")
    for entry in meta["files"].values():
        int(entry["bytes"]), str(entry["sha256"])
    int(meta["counts"]["documents"]), int(meta["counts"]["tokens"]), str(meta["tokenizer"]["fingerprint"])


def _check_file(path: Path, expected: dict[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing; copy the whole folder, or {AGAIN}")
    if path.stat().st_size != expected["bytes"]:
        raise DataError(
            f"{path} is {path.stat().st_size} bytes where {META} says {expected['bytes']}; it was cut or changed: "
            f"{AGAIN}"
        )
    if verify and file_digest(path)["sha256"] != expected["sha256"]:
        raise DataError(f"{path} does not have the SHA-256 that {META} says; it is damaged: {AGAIN}")


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size % dtype.itemsize:
        raise DataError(
            f"{path} is no whole number of {dtype.name} ({path.stat().st_size} bytes); it is damaged: {AGAIN}"
        )
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
