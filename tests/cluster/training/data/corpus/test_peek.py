"""The beginning of a corpus is read before anything starts, and says what is wrong with all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.training.data.corpus.document import DataError
from cluster.training.data.corpus.peek import peek
from cluster.training.data.corpus.sources import SourceOptions, open_source


def test_a_text_in_another_encoding_is_refused_with_the_setting_to_give(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(("これは日本語です。" * 50).encode("shift_jis"))
    with pytest.raises(DataError, match=r"is not utf-8: .*corpus.encoding"):
        peek(open_source(path))
    peek(open_source(path, SourceOptions(encoding="shift_jis")))


def test_a_field_of_another_name_is_refused_with_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"content": "x", "lang": "c"}) + "\n")
    with pytest.raises(DataError, match=r"no field 'text'; it has \['content', 'lang'\]; .*corpus.field"):
        peek(open_source(path))
    peek(open_source(path, SourceOptions(field="content")))


def test_every_file_of_a_folder_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good " * 100)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"b\.txt is not utf-8"):
        peek(open_source(tmp_path), characters=10)


def test_only_the_beginning_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 100}) + "\n" + "no json\n")
    peek(open_source(path), characters=100)
    with pytest.raises(DataError, match="line 2 is not valid JSON"):
        peek(open_source(path), characters=101)


@pytest.mark.parametrize("content", [b"", b"\n"])
def test_a_corpus_without_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="there is no text to learn from"):
        peek(open_source(path))
