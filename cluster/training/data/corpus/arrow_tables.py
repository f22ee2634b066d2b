"""Parquet and Arrow files: a text column, optionally a prompt column, read a batch of rows at a time through pyarrow.

Arrow files are read as streams (what `datasets.save_to_disk` writes) or as IPC files, whichever they are. Which files
belong to a Hugging Face dataset folder is decided in dataset_folders.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pyarrow.types as types

from cluster.training.data.corpus.document import DataError, Document, SourceFile

ROWS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class TableSource:
    """Parquet or Arrow files with a column of texts; `prompt_field` names a column to condition on and not to learn."""

    files: tuple[SourceFile, ...]
    field: str = "text"
    prompt_field: str | None = None

    @property
    def has_prompts(self) -> bool:
        return self.prompt_field is not None

    @property
    def settings(self) -> dict[str, str | None]:
        return {"kind": "table", "field": self.field, "prompt_field": self.prompt_field}

    @property
    def columns(self) -> list[str]:
        return [self.field] if self.prompt_field is None else [self.field, self.prompt_field]

    def documents(self, file: SourceFile) -> Iterator[Document]:
        row = 0
        try:
            for batch, share in _batches(file.path, self.columns):
                for values in zip(*(_texts(batch, name, file.path) for name in self.columns), strict=True):
                    row += 1
                    where = f"{file.path}, row {row}"
                    if None in values:
                        raise DataError(f"{where}: {self.columns[values.index(None)]!r} is null; remove such rows")
                    yield Document(values[0], where, "".join(values[1:]), share)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{file.path} cannot be read after row {row}: {error}; the file is damaged or not what its name says"
            ) from error


def _batches(path: Path, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, float]]:
    """Batches of rows, each with the share of the file read so far."""
    if path.suffix == ".parquet":
        table = pyarrow.parquet.ParquetFile(path)
        check_columns(table.schema_arrow.names, columns, path)
        done, total = 0, max(1, table.metadata.num_rows)
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
            done += batch.num_rows
            yield batch, done / total
        return
    size = max(1, path.stat().st_size)
    with pa.memory_map(str(path)) as stream:
        for batch in _arrow_batches(stream):
            check_columns(batch.schema.names, columns, path)
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield batch.slice(start, ROWS_AT_ONCE), stream.tell() / size


def _arrow_batches(stream: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    """An IPC file starts with ARROW1, a stream does not."""
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if not is_file:
        yield from pa.ipc.open_stream(stream)
        return
    reader = pa.ipc.open_file(stream)
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def check_columns(names: list[str], wanted: list[str], path: Path) -> None:
    """Every wanted column is there, once."""
    for name in wanted:
        if names.count(name) != 1:
            found = "several columns" if name in names else "no column"
            has = f"{sorted(names)}"[:300]  # of a CSV file the first row, whatever that is
            raise DataError(f"{path}: {found} {name!r}; it has {has}; name the one of the text (corpus.field)")


def _texts(batch: pa.RecordBatch, name: str, path: Path) -> list[str | None]:
    column = batch.column(name)
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if not is_text:
        raise DataError(f"{path}: column {name!r} holds {column.type}, not text; name another column")
    texts: list[str | None] = column.to_pylist()
    return texts
