"""`peek(source)`: reads the beginning of a corpus, so that what is wrong with it is said before anything starts.

A field that is not there, another encoding, a file that is no table: nearly always all of a corpus or none of it. What
is wrong further on is found when the whole is tokenized.
"""

from __future__ import annotations

from cluster.training.data.corpus.document import DataError, Source, SourceFile
from cluster.training.data.corpus.plain_text import TextSource, decoded

CHARACTERS = 4_000_000
"""About a second of reading."""


def peek(source: Source, characters: int = CHARACTERS) -> None:
    """Reads up to so many characters, at least a document or a piece of every file; a DataError says what is wrong."""
    share = characters // max(1, len(source.files))
    if not sum(_read(source, file, share) for file in source.files):
        raise DataError(f"{', '.join(str(file.path) for file in source.files[:3])}: there is no text to learn from")


def _read(source: Source, file: SourceFile, characters: int) -> int:
    read = 0
    try:
        texts = (  # a text file may be one document as a whole, which would all be read
            (text for text, _ in decoded(file.path, source.encoding))
            if isinstance(source, TextSource)
            else (document.prompt + document.text for document in source.documents(file))
        )
        for text in texts:
            read += len(text)
            if read >= characters:
                break
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror or error}") from error
    return read
