"""CSV and TSV files become the documents they hold, in their order, and what cannot be read is named with its line."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from cluster.training.data.corpus.document import DataError, Document
from cluster.training.data.corpus.sources import SourceOptions, open_source
from cluster.training.data.store.tokenize_corpus import TokenizeProgress, tokenize_corpus
from tests.cluster.training.data.made_corpora import ByteTokenizer, random_texts, write_jsonl

DATA = Path(__file__).resolve().parents[4] / "data" / "saved-dataset"
TEXTS = ["plain", 'a "quoted" one, with a comma', "two\nlines", "CR\r\nLF", "", "二\t三", "x" * 300_000, " end "]


def documents(path: Path, **options: str) -> list[Document]:
    source = open_source(path, SourceOptions(**options))
    return [document for file in source.files for document in source.documents(file)]


def texts(path: Path, **options: str) -> list[str]:
    return [document.text for document in documents(path, **options)]


def write_csv(path: Path, rows: list[list[str]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_values_are_taken_as_they_were_written(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = [[str(number), text] for number, text in enumerate(TEXTS)]
    assert texts(write_csv(tmp_path / name, [["id", "text"], *rows], delimiter)) == TEXTS


def test_a_file_that_datasets_wrote_is_read() -> None:
    found = [(document.prompt, document.text) for document in documents(DATA / "train.csv", prompt_field="prompt")]
    assert found == [(f"{number}?", f'text {number}, "quoted"\nand 二 lines') for number in range(5)]


def test_documents_are_named_by_their_first_line_and_tell_how_far_the_file_is(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [["text"], ["one\nof two lines"], ["next"]])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n\r\nlast")
    found = documents(path)
    assert [document.text for document in found] == ["one\nof two lines", "next", "last"]
    assert [document.where for document in found] == [f"{path}, line {line}" for line in (2, 4, 7)]
    shares = [document.consumed for document in found]
    assert 0 < shares[0] < shares[1] < shares[2] == 1.0


def test_other_encodings_are_read_when_asked_for(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [["text"], ["表示ソ, 二"]], encoding="cp932")
    assert texts(path, encoding="cp932") == ["表示ソ, 二"]
    with pytest.raises(DataError, match=r"a\.csv is not utf-8: 95 at byte 7 .*corpus.encoding"):
        texts(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"2,b,c", r"line 3: 3 values, and the first row names 2 columns \(id, text\); mend it"),
        (b"2", r"line 3: 1 values, and the first row names 2 columns"),
        (b'2,"never closed\n3,c', r"line 3 is no row of a CSV file: unexpected end of data"),
        (b'2,"a"b', r"line 3 is no row of a CSV file: ',' expected after '\"'"),
        (b"2,\xff", r"not utf-8: ff at byte 14 "),
    ],
)
def test_a_bad_row_is_named_after_those_before_it_were_read(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,a\n" + line + b"\n")
    source = open_source(tmp_path / "a.csv")
    rows = source.documents(source.files[0])
    assert next(rows).text == "a"
    with pytest.raises(DataError, match=rf"a\.csv.*{message}"):
        list(rows)


def test_a_column_must_be_there_once(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [["id", "text", "text"], ["1", "a", "b"]])
    with pytest.raises(DataError, match=r"a\.csv: no column 'body'; it has \['id', 'text', 'text'\]"):
        texts(path, field="body")
    with pytest.raises(DataError, match=r"a\.csv: no column 'q'"):
        texts(path, field="id", prompt_field="q")
    with pytest.raises(DataError, match=r"a\.csv: several columns 'text'"):
        texts(path)
    path.write_bytes(b"\n")
    with pytest.raises(DataError, match=r"a\.csv: no column 'text'; it has \[\]"):
        texts(path)


class Stopped(Exception):
    pass


def test_the_tokens_are_those_of_the_same_texts_as_jsonl_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    rows = [text + '",\n' for text in random_texts(200, 60)]
    csv_file = write_csv(tmp_path / "a.csv", [["text"], *([text] for text in rows)])
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in rows])
    whole = tokenize_corpus(open_source(jsonl), ByteTokenizer(), tmp_path / "of-jsonl")

    def stop(progress: TokenizeProgress) -> None:
        if progress.documents > 100:
            raise Stopped

    out = tmp_path / "of-csv"
    with pytest.raises(Stopped):
        tokenize_corpus(open_source(csv_file), ByteTokenizer(), out, progress=stop, checkpoint_tokens=300)
    again = ByteTokenizer()
    store = tokenize_corpus(open_source(csv_file), again, out, checkpoint_tokens=300)
    assert again.calls < 110, "what was done was not done again"
    assert store.num_documents == whole.num_documents == 200
    everything = np.arange(whole.num_tokens)
    assert np.array_equal(store.read(everything), whole.read(everything))
