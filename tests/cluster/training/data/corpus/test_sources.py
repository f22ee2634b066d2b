"""Text and JSONL files become the documents they hold, and what cannot be read is named with file and byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.training.data.corpus import plain_text as text_module
from cluster.training.data.corpus.document import DataError
from cluster.training.data.corpus.sources import SourceOptions, open_source
from parallel.errors import ConfigError
from tests.cluster.training.data.made_corpora import write_jsonl

JAPANESE = "親譲りの無鉄砲で\r\n小供の時から損ばかりしている。\n\n学校の二階から😀飛び降りて"


def texts(path: Path, **options: str) -> list[str]:
    source = open_source(path, SourceOptions(**options))
    return [document.text for file in source.files for document in source.documents(file)]


@pytest.fixture(params=[3, 1 << 20])
def any_chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Read files in tiny pieces, which cut characters and separators, and in whole ones."""
    monkeypatch.setattr(text_module, "CHUNK_BYTES", request.param)
    return int(request.param)


def test_a_text_file_is_one_document_taken_as_it_is(tmp_path: Path, any_chunk: int) -> None:
    (tmp_path / "a.txt").write_bytes(JAPANESE.encode())
    assert texts(tmp_path / "a.txt") == [JAPANESE]


@pytest.mark.parametrize("separator", ["\n", "\n\n", "<|endoftext|>"])
def test_a_separator_cuts_a_text_file_wherever_the_reads_end(tmp_path: Path, any_chunk: int, separator: str) -> None:
    parts = ["first", "second 二つ", "", "last"]
    (tmp_path / "a.txt").write_bytes(separator.join(parts).encode())
    assert texts(tmp_path / "a.txt", separator=separator) == parts


def test_a_byte_order_mark_is_no_text(tmp_path: Path, any_chunk: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + JAPANESE.encode())
    assert texts(tmp_path / "a.txt") == [JAPANESE]
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    assert texts(tmp_path / "b.jsonl") == ["one"]


def test_shift_jis_is_read_when_asked_for_and_refused_otherwise(tmp_path: Path, any_chunk: int) -> None:
    text = "親譲りの無鉄砲で小供の時から損ばかりしている。表示ソ"  # the last ones have bytes that look like ASCII
    (tmp_path / "a.txt").write_bytes(("abc" + text).encode("shift_jis"))
    assert texts(tmp_path / "a.txt", encoding="shift_jis") == ["abc" + text]
    with pytest.raises(DataError, match=r"a\.txt is not utf-8: 90 at byte 3 .*corpus.encoding"):
        texts(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("content", "position"),
    [(b"abcdefgh\xff", 8), ("ab二".encode()[:-1], 2), ("二二二".encode() + b"\x80", 9), (b"\xe4\xba" + b"abcdef", 0)],
)
def test_the_first_byte_that_is_not_utf8_is_named(
    tmp_path: Path, any_chunk: int, content: bytes, position: int
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.txt is not utf-8: .* at byte {position} "):
        texts(tmp_path / "a.txt")


@pytest.mark.parametrize("encoding", ["utf-16", "klingon"])
def test_encodings_that_cannot_be_read_are_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=encoding):
        texts(tmp_path / "a.txt", encoding=encoding)


def test_jsonl_takes_a_named_field_and_a_prompt(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "1+1?", "a": " 2"}, {"q": "何", "a": "それ"}])
    path.write_text(path.read_text(encoding="utf-8").replace("\n", "\n\n"), encoding="utf-8")
    source = open_source(path, SourceOptions(field="a", prompt_field="q"))
    found = [(document.prompt, document.text) for document in source.documents(source.files[0])]
    assert found == [("1+1?", " 2"), ("何", "それ")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"line 2 is not valid JSON"),
        (b'{"body": "x"}', r"line 2: no field 'text'; it has \['body'\]"),
        (b'{"text": 5}', r"line 2: field 'text' is int"),
        (b'["x"]', r"line 2: list is not an object"),
        (b'{"text": "\xff"}', r"not utf-8: ff at byte 24 "),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "a.jsonl")


def test_a_folder_is_read_in_the_order_of_names_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.txt", ".cache/0.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.txt", "b/1.txt", "b/2.txt"]
    assert [file.name for file in open_source(tmp_path).files] == ["a.txt", "b/1.txt", "b/2.txt"]


def test_what_a_corpus_is_must_be_clear(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(DataError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"a\.md: names read here end in"):
        open_source(tmp_path / "a.md")
    assert texts(tmp_path / "a.md", kind="text") == ["x"]
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(DataError, match="several kinds of files"):
        open_source(tmp_path)


@pytest.mark.parametrize("option", [{"field": "body"}, {"prompt_field": "q"}, {"split": "train"}])
def test_an_option_without_effect_is_refused(tmp_path: Path, option: dict[str, str]) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match=f"{next(iter(option))}=.* means nothing for kind 'text'"):
        open_source(tmp_path / "a.txt", SourceOptions(**option))
