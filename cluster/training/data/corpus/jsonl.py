"""JSONL files: a JSON object per line, the text in a named field, optionally a prompt in another. Blank lines are
passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.training.data.corpus.document import DataError, Document, SourceFile
from cluster.training.data.corpus.plain_text import check_encoding, decoded_lines


def text_field(row: object, field: str, where: str) -> str:
    """The string in `field` of one object."""
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: {type(row).__name__} is not an object; each line should be one, such as "
            f"{{{field!r}: 'some text'}}"
        )
    if field not in row:
        raise DataError(
            f"{where}: no field {field!r}; it has {sorted(row)}; name the field that holds the text "
            "(corpus.field, or labels.text_field of labelled texts)"
        )
    value = row[field]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: field {field!r} is {type(value).__name__}, not text; mend the line or name another field"
        )
    return value


@dataclass(frozen=True, kw_only=True)
class JsonLinesSource:
    """JSONL files; `prompt_field` names text to condition on and not to learn."""

    files: tuple[SourceFile, ...]
    field: str = "text"
    prompt_field: str | None = None
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        check_encoding(self.encoding)

    @property
    def has_prompts(self) -> bool:
        return self.prompt_field is not None

    @property
    def settings(self) -> dict[str, str | None]:
        encoding = check_encoding(self.encoding)
        return {"kind": "jsonl", "field": self.field, "prompt_field": self.prompt_field, "encoding": encoding}

    def documents(self, file: SourceFile) -> Iterator[Document]:
        for number, (line, share) in enumerate(decoded_lines(file.path, self.encoding), start=1):
            if text := line.strip():
                yield self._document(text, f"{file.path}, line {number}", share)

    def _document(self, line: str, where: str, share: float) -> Document:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not valid JSON: {error}; each line should be one whole object") from error
        prompt = "" if self.prompt_field is None else text_field(row, self.prompt_field, where)
        return Document(text_field(row, self.field, where), where, prompt, share)
