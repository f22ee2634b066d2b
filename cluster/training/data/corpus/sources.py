"""`open_source(path)`: the corpus at a path, by what its files are called.

A folder is read with all below it, in the order of the names, and may hold one kind only. Nothing is read yet; the
readers are plain_text.py, jsonl.py, csv_rows.py and arrow_tables.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.training.data.corpus.arrow_tables import TableSource
from cluster.training.data.corpus.csv_rows import CsvSource
from cluster.training.data.corpus.dataset_folders import is_saved_dataset, saved_files, shard_files
from cluster.training.data.corpus.document import DataError, Source, SourceFile
from cluster.training.data.corpus.jsonl import JsonLinesSource
from cluster.training.data.corpus.plain_text import TextSource
from parallel.errors import ConfigError

KINDS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "table",
    ".arrow": "table",
    ".feather": "table",
}
"""What files are, by the end of their names."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How a corpus is read. `kind` is "text", "jsonl", "csv" or "table" where the names do not say; what does not apply
    to the kind is refused.
    """

    kind: str | None = None
    encoding: str | None = None  # text, jsonl, csv: utf-8 unless given
    separator: str | None = None  # text: what stands between documents; a file is one document unless given
    field: str | None = None  # jsonl, csv, table: "text" unless given
    prompt_field: str | None = None  # jsonl, csv, table: conditioned on, not learned
    split: str | None = None  # table: one split of a dataset folder

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS.values():
            raise ConfigError(f"corpus.kind {self.kind!r} is unknown; choose one of {sorted(set(KINDS.values()))}")

    def check(self, kind: str) -> None:
        """Refuse options that would have no effect on a corpus of this kind."""
        used = {
            "text": ("encoding", "separator"),
            "jsonl": ("encoding", "field", "prompt_field"),
            "csv": ("encoding", "field", "prompt_field"),
            "table": ("field", "prompt_field", "split"),
        }
        for name in ("encoding", "separator", "field", "prompt_field", "split"):
            if getattr(self, name) is not None and name not in used[kind]:
                setting = "dataset_split" if name == "split" else name
                raise ConfigError(
                    f"corpus.{setting}={getattr(self, name)!r} means nothing for kind {kind!r}; leave it out"
                )


def open_source(path: str | Path, options: SourceOptions | None = None) -> Source:
    """The corpus at a file or folder."""
    options, path = options or SourceOptions(), Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; give a text, JSONL, CSV, parquet or arrow file or a folder of them")
    files = _files(path, options)
    kind = options.kind or _kind(path, files)
    options.check(kind)
    if kind == "table" and path.is_dir() and not is_saved_dataset(path):
        files = shard_files(path, files, options.split)
    elif options.split is not None and not path.is_dir():
        raise ConfigError(f"split={options.split!r} means nothing for the single file {path}; leave it out")
    return BUILDERS[kind](_named(path, files), options)


def _named(path: Path, files: list[Path]) -> tuple[SourceFile, ...]:
    root = path if path.is_dir() else path.parent
    return tuple(SourceFile(file, file.relative_to(root).as_posix()) for file in files)


def _files(path: Path, options: SourceOptions) -> list[Path]:
    if path.is_file():
        return [path]
    if is_saved_dataset(path):
        return saved_files(path, options.split)
    found = (file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    wanted = [file for file in found if options.kind or file.suffix in KINDS]
    if not wanted:
        raise DataError(
            f"{path} has no file that ends in {', '.join(KINDS)}; rename the files or say what they are (corpus.kind)"
        )
    return sorted(wanted, key=lambda file: file.relative_to(path).as_posix())


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _kind(path: Path, files: list[Path]) -> str:
    kinds = {KINDS.get(file.suffix, "") for file in files}
    if len(kinds) > 1:
        raise DataError(
            f"{path} holds several kinds of files ({', '.join(sorted({file.suffix for file in files}))}); keep them "
            "in folders of their own"
        )
    kind = kinds.pop() if kinds else "table"
    if not kind:
        raise DataError(
            f"{path}: names read here end in {', '.join(KINDS)}; rename the file or say what it is (corpus.kind)"
        )
    return kind


def _text(files: tuple[SourceFile, ...], options: SourceOptions) -> Source:
    return TextSource(files=files, separator=options.separator, encoding=options.encoding or "utf-8")


def _jsonl(files: tuple[SourceFile, ...], options: SourceOptions) -> Source:
    field, encoding = options.field or "text", options.encoding or "utf-8"
    return JsonLinesSource(files=files, field=field, prompt_field=options.prompt_field, encoding=encoding)


def _csv(files: tuple[SourceFile, ...], options: SourceOptions) -> Source:
    field, encoding = options.field or "text", options.encoding or "utf-8"
    return CsvSource(files=files, field=field, prompt_field=options.prompt_field, encoding=encoding)


def _table(files: tuple[SourceFile, ...], options: SourceOptions) -> Source:
    return TableSource(files=files, field=options.field or "text", prompt_field=options.prompt_field)


BUILDERS: dict[str, Callable[[tuple[SourceFile, ...], SourceOptions], Source]] = {
    "text": _text,
    "jsonl": _jsonl,
    "csv": _csv,
    "table": _table,
}
