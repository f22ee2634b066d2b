"""Parquet and Arrow files, and folders of them as Hugging Face lays them out (written here as `datasets` does)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from cluster.training.data.corpus.document import DataError
from cluster.training.data.corpus.sources import SourceOptions, open_source

DATA = Path(__file__).resolve().parents[4] / "data" / "saved-dataset"
ROWS = [f"text {number} 二" for number in range(2500)]


def texts(path: Path, **options: str) -> list[str]:
    source = open_source(path, SourceOptions(**options))
    return [document.text for file in source.files for document in source.documents(file)]


def table(rows: list[str | None], column: str = "text", kind: Any = None) -> Any:
    return pa.table({"id": list(range(len(rows))), column: pa.array(rows, kind or pa.string())})


def write_arrow(path: Path, content: Any, stream: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file:
        with (pa.ipc.new_stream if stream else pa.ipc.new_file)(file, content.schema) as writer:
            writer.write_table(content, 700)
    return path


def save_to_disk(folder: Path, *shards: list[str], **state: object) -> Path:
    names = [f"data-{index:05}-of-{len(shards):05}.arrow" for index in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        write_arrow(folder / name, table([*rows]))
    entries = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(entries | state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_the_rows_of_a_parquet_file_are_documents(tmp_path: Path) -> None:
    parquet.write_table(table([*ROWS], "body"), tmp_path / "a.parquet", row_group_size=300)
    assert texts(tmp_path / "a.parquet", field="body") == ROWS


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_arrow_streams_and_files_of_any_text_type_are_read(tmp_path: Path, stream: bool, kind: str) -> None:
    types = {
        "string": pa.string(),
        "large_string": pa.large_string(),
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
    }
    write_arrow(tmp_path / "a.arrow", table([*ROWS], kind=types[kind]), stream)
    assert texts(tmp_path / "a.arrow") == ROWS


def test_feather_files_are_read(tmp_path: Path) -> None:
    feather.write_feather(table([*ROWS]), tmp_path / "a.feather", compression="lz4")
    assert texts(tmp_path) == ROWS


def test_what_datasets_itself_saved_is_read() -> None:
    def lines(*numbers: int) -> list[str]:
        return [f'text {number}, "quoted"\nand 二 lines' for number in numbers]

    assert texts(DATA / "saved", split="train") == lines(*range(5))
    assert texts(DATA / "saved", split="test") == lines(5, 6)
    assert sorted(texts(DATA / "shuffled")) == lines(*range(5)) != texts(DATA / "shuffled")


def test_a_saved_dataset_is_read_in_the_order_it_lists(tmp_path: Path) -> None:
    save_to_disk(tmp_path, ROWS[:10], ROWS[10:30])
    write_arrow(tmp_path / "cache-0123.arrow", table(["not part of it"]))
    assert texts(tmp_path) == ROWS[:30]


def test_a_prompt_column_is_read_beside_the_text(tmp_path: Path) -> None:
    content = pa.table({"a": ["2", "4"], "q": ["1+1", "2+2"]})
    parquet.write_table(content, tmp_path / "a.parquet")
    source = open_source(tmp_path, SourceOptions(field="a", prompt_field="q"))
    assert [(d.prompt, d.text) for d in source.documents(source.files[0])] == [("1+1", "2"), ("2+2", "4")]


def test_a_saved_dataset_of_several_splits_needs_one_named(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "train", ROWS[:3])
    save_to_disk(tmp_path / "test", ROWS[3:5])
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert texts(tmp_path, split="test") == ROWS[3:5]
    with pytest.raises(DataError, match=r"splits \['test', 'train'\] and no split was given"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="no split 'valid'"):
        open_source(tmp_path, SourceOptions(split="valid"))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001-a1b2.parquet"),
        ("train/0.parquet", "test/0.parquet"),
        ("train.parquet", "test.parquet"),
    ],
)
def test_splits_of_parquet_shards_are_never_mixed_unasked(tmp_path: Path, train: str, test: str) -> None:
    for name, rows in ((train, ROWS[:3]), (test, ROWS[3:5])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        parquet.write_table(table([*rows]), tmp_path / name)
    assert texts(tmp_path, split="train") == ROWS[:3]
    with pytest.raises(DataError, match="no split was given"):
        open_source(tmp_path)


def test_parquet_shards_of_one_split_need_none_named(tmp_path: Path) -> None:
    for index in range(2):
        parquet.write_table(table([*ROWS[index * 5 : index * 5 + 5]]), tmp_path / f"train-{index:05}-of-00002.parquet")
    assert texts(tmp_path) == ROWS[:10]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_damaged_table_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        parquet.write_table(table([*ROWS]), path)
    else:
        write_arrow(path, table([*ROWS]))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"a\.{suffix} cannot be read after row \d+"):
        texts(path)


def test_a_column_must_exist_hold_text_and_have_no_nulls(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(table(["a", None]), path)
    with pytest.raises(DataError, match=r"row 2: 'text' is null"):
        texts(path)
    with pytest.raises(DataError, match=r"no column 'body'; it has \['id', 'text'\]"):
        texts(path, field="body")
    with pytest.raises(DataError, match="column 'id' holds int64, not text"):
        texts(path, field="id")


def test_a_saved_dataset_with_a_missing_or_reordered_part_is_refused(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "one", ROWS[:2], ROWS[2:4])
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow is missing"):
        open_source(tmp_path / "one")
    save_to_disk(tmp_path / "two", ROWS[:2], _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match="flatten_indices"):
        open_source(tmp_path / "two")
