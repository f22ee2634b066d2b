"""CSV and TSV files: the first row names the columns, every other one holds a text, optionally a prompt. A value in
quotes may hold line ends; blank lines are passed over.

Python's csv module reads them, not pyarrow's, which reads on to the end where a quote is never closed, refuses a text
that is longer than one of its blocks, and does not say in which row a byte is not UTF-8.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.training.data.corpus.arrow_tables import check_columns
from cluster.training.data.corpus.document import DataError, Document, SourceFile
from cluster.training.data.corpus.plain_text import check_encoding, decoded_lines

csv.field_size_limit(1 << 30)  # characters of a text; 131072 by itself


@dataclass(frozen=True, kw_only=True)
class CsvSource:
    """CSV files; `prompt_field` names a column to condition on and not to learn. In *.tsv tabs stand between values."""

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
        return {"kind": "csv", "field": self.field, "prompt_field": self.prompt_field, "encoding": encoding}

    def documents(self, file: SourceFile) -> Iterator[Document]:
        share = 0.0

        def lines() -> Iterator[str]:
            nonlocal share
            for line, so_far in decoded_lines(file.path, self.encoding):
                share = so_far
                yield line

        rows = _rows(lines(), file)
        _, header = next(rows, (1, []))
        wanted = [self.field] if self.prompt_field is None else [self.field, self.prompt_field]
        check_columns(header, wanted, file.path)
        places = [header.index(name) for name in wanted]
        for line, row in rows:
            where = f"{file.path}, line {line}"
            if len(row) != len(header):
                names = ", ".join(header)[:300]
                raise DataError(
                    f"{where}: {len(row)} values, and the first row names {len(header)} columns ({names}); mend it"
                )
            text, *prompt = (row[place] for place in places)
            yield Document(text, where, "".join(prompt), share)


def _rows(lines: Iterator[str], file: SourceFile) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the number of its first line."""
    rows = csv.reader(lines, delimiter="\t" if file.path.suffix == ".tsv" else ",", strict=True)
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError(f"{file.path}, line {line} is no row of a CSV file: {error}; mend it") from error
        if row is None:
            return
        if row:
            yield line, row
