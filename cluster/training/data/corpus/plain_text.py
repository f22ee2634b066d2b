"""Plain text files. A file is one document unless a separator is given; the separator belongs to no document.

Texts are taken as they are (line ends too; only a byte order mark at the start is dropped), decoded piece by piece, and
refused with the position of the first byte that the encoding does not have.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.training.data.corpus.document import DataError, Document, SourceFile
from parallel.errors import ConfigError

CHUNK_BYTES = 1 << 20


def check_encoding(encoding: str) -> str:
    """The codec's own name; an error for an unknown one and for those in which a line feed is not the byte 0x0A."""
    try:
        name, line_feed = codecs.lookup(encoding).name, "\n".encode(encoding)
    except (LookupError, UnicodeError) as error:
        raise ConfigError(
            f"corpus.encoding {encoding!r} is unknown; give one of Python's, such as 'utf-8', 'shift_jis' or 'cp932'"
        ) from error
    if line_feed != b"\n":
        raise ConfigError(
            f"corpus.encoding {encoding!r} is not read here: lines must end with byte 0x0A; convert the text to UTF-8"
        )
    return name


def undecodable(path: Path, encoding: str, position: int, error: UnicodeDecodeError) -> DataError:
    """The error for a text that is not in its encoding."""
    bad = error.object[error.start : error.end].hex(" ") or "the end of the file"
    return DataError(
        f"{path} is not {encoding}: {bad} at byte {position} ({error.reason}); convert the file, or give its encoding "
        "(corpus.encoding)"
    )


def decoded(path: Path, encoding: str) -> Iterator[tuple[str, float]]:
    """A file's text in pieces, each with the share of the file read so far."""
    decoder = codecs.getincrementaldecoder(encoding)()
    total, read = max(1, path.stat().st_size), 0
    with path.open("rb") as stream:
        while True:
            chunk = stream.read(CHUNK_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise undecodable(path, encoding, read - pending + error.start, error) from error
            yield text.removeprefix("\ufeff") if read == 0 else text, min(1.0, (read + len(chunk)) / total)
            read += len(chunk)
            if not chunk:
                return


def decoded_lines(path: Path, encoding: str) -> Iterator[tuple[str, float]]:
    """A file's lines with their ends, each with the share of the file read so far."""
    total, position = max(1, path.stat().st_size), 0
    with path.open("rb") as stream:
        for line in stream:
            try:
                text = line.decode(encoding)
            except UnicodeDecodeError as error:
                raise undecodable(path, encoding, position + error.start, error) from error
            position += len(line)
            yield text.removeprefix("\ufeff") if position == len(line) else text, position / total


def split_stream(pieces: Iterator[tuple[str, float]], separator: str | None) -> Iterator[tuple[str, float]]:
    """The documents of a text that comes in pieces; in memory is at most one document and one piece."""
    parts: list[str] = []
    share = 1.0
    for text, share in pieces:
        if separator is None:
            parts.append(text)
            continue
        *whole, rest = ("".join(parts) + text).split(separator)
        for document in whole:
            yield document, share
        parts = [rest]
    yield "".join(parts), share


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Text files, each one document or several between `separator`s ("\\n": a line each; "\\n\\n": paragraphs)."""

    files: tuple[SourceFile, ...]
    separator: str | None = None
    encoding: str = "utf-8"
    has_prompts: bool = False

    def __post_init__(self) -> None:
        check_encoding(self.encoding)
        if self.separator == "":
            raise ConfigError("corpus.separator is empty; leave it out to make each file one document")

    @property
    def settings(self) -> dict[str, str | None]:
        return {"kind": "text", "separator": self.separator, "encoding": check_encoding(self.encoding)}

    def documents(self, file: SourceFile) -> Iterator[Document]:
        texts = split_stream(decoded(file.path, self.encoding), self.separator)
        for number, (text, share) in enumerate(texts, start=1):
            yield Document(text, f"{file.path}, document {number}", consumed=share)
