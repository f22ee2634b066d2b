"""Writing a folder of tokens so that a kill at any moment loses little and never leaves a half-written folder under its
name.

Everything grows in `<folder>.partial`. A checkpoint flushes the files and then replaces journal.json, which says how
far they are valid and how far the corpus was read; a restart cuts them back to that. The last act is to rename the
folder.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from cluster.training.data.corpus.document import DataError
from cluster.training.data.store.token_store import DOCUMENTS, HASHES, META, PROMPTS, TOKENS, file_digest

JOURNAL, LOCK = "journal.json", "lock"


@dataclass
class Position:
    """How far a corpus was read and what came out of it. `documents_in_file` counts the empty ones too."""

    file: int = 0
    documents_in_file: int = 0
    documents: int = 0
    tokens: int = 0
    empty_documents: int = 0


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_json(path: Path, value: object) -> None:
    """Write a JSON file that is either the old one or the new one, whenever the machine stops."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Hold a folder against another process that writes the same tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another process is writing {folder}; wait for it, or choose another folder") from error
        yield folder


class TokenWriter:
    """The growing files of one folder of tokens. `plan` is everything that decides their content: another plan starts
    from nothing.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], dtype: str, has_prompts: bool) -> None:
        self.folder, self.plan = folder, plan
        self.dtypes = {TOKENS: dtype, DOCUMENTS: "uint64", HASHES: "uint64"} | (
            {PROMPTS: "uint32"} if has_prompts else {}
        )
        self.position = self._restored() or self._fresh()
        self.files = self._open()

    def _restored(self) -> Position | None:
        """Where an earlier run of the same plan stopped."""
        try:
            journal = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
            position = Position(**journal["position"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        sizes = self._sizes(position)
        whole = all(
            (self.folder / name).is_file() and (self.folder / name).stat().st_size >= size
            for name, size in sizes.items()
        )
        return position if whole and journal.get("plan") == self.plan else None

    def _fresh(self) -> Position:
        (self.folder / JOURNAL).unlink(missing_ok=True)
        for name in self.dtypes:
            (self.folder / name).write_bytes(b"")
        (self.folder / DOCUMENTS).write_bytes(np.zeros(1, "<u8").tobytes())
        return Position()

    def _sizes(self, position: Position) -> dict[str, int]:
        counts = {
            TOKENS: position.tokens,
            DOCUMENTS: position.documents + 1,
            HASHES: position.documents,
            PROMPTS: position.documents,
        }
        return {name: counts[name] * np.dtype(dtype).itemsize for name, dtype in self.dtypes.items()}

    def _open(self) -> dict[str, IO[bytes]]:
        for name, size in self._sizes(self.position).items():
            os.truncate(self.folder / name, size)
        return {name: (self.folder / name).open("ab") for name in self.dtypes}

    def append(self, ids: Sequence[int], digest: int, prompt_tokens: int) -> None:
        """One document: its ids, 64 bits of its text and how many of the ids are its prompt."""
        self.position.documents += 1
        self.position.tokens += len(ids)
        values = {TOKENS: ids, DOCUMENTS: [self.position.tokens], HASHES: [digest], PROMPTS: [prompt_tokens]}
        for name, file in self.files.items():
            file.write(np.asarray(values[name], np.dtype(self.dtypes[name]).newbyteorder("<")).tobytes())

    def checkpoint(self) -> None:
        """From here a restart goes on."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        replace_json(self.folder / JOURNAL, {"plan": self.plan, "position": asdict(self.position)})

    def finish(self, folder: Path) -> None:
        """Write meta.json and give the folder its name."""
        self.checkpoint()
        position = self.position
        counts = {
            "documents": position.documents,
            "tokens": position.tokens,
            "empty_documents": position.empty_documents,
        }
        digests = {name: file_digest(self.folder / name) for name in self.dtypes}
        replace_json(self.folder / META, self.plan | {"dtype": self.dtypes[TOKENS], "counts": counts, "files": digests})
        self.folder.rename(folder)
        sync_folder(folder.parent)
        for name in (JOURNAL, LOCK):
            (folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
