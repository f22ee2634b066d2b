"""A folder of tokens that was damaged, cut or mixed up says which file is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.training.data.batches.data_loader import Loader
from cluster.training.data.batches.packing import PackedDataset
from cluster.training.data.corpus.document import DataError
from cluster.training.data.store.token_store import TokenStore
from tests.cluster.training.data.made_corpora import random_texts, store_of

FILES = ["tokens.bin", "documents.bin", "hashes.bin", "prompts.bin"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return store_of(tmp_path, random_texts(50, 40), prompts=["prompt"] * 50).folder


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_named(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name} is \d+ bytes where meta\.json says \d+"):
        TokenStore.open(folder)


@pytest.mark.parametrize("name", [*FILES, "meta.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name} (is missing|does not exist)"):
        TokenStore.open(folder)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_by_verify(folder: Path, name: str) -> None:
    TokenStore.open(folder, verify=True)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} .*damaged"):
        TokenStore.open(folder, verify=True)


def edit_meta(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.update(format="another"), r"meta\.json is of format 'another'"),
        (lambda meta: meta.update(dtype="uint32"), r"meta\.json: dtype 'uint32'"),
        (lambda meta: meta.pop("counts"), r"meta\.json is damaged .KeyError: 'counts'"),
        (lambda meta: meta["counts"].update(documents="many"), r"meta\.json is damaged"),
        (lambda meta: meta["counts"].update(documents=49), r"documents\.bin has 51 entries where meta\.json counts 50"),
        (lambda meta: meta["counts"].update(tokens=1), r"tokens\.bin has \d+ entries where meta\.json counts 1"),
        (lambda meta: meta["files"].pop("hashes.bin"), r"meta\.json lists the files"),
    ],
)
def test_a_meta_file_that_does_not_fit_is_named(folder: Path, change: Any, message: str) -> None:
    edit_meta(folder, change)
    with pytest.raises(DataError, match=message):
        TokenStore.open(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_meta_file_that_is_no_json_object_is_named(folder: Path, content: bytes) -> None:
    (folder / "meta.json").write_bytes(content)
    with pytest.raises(DataError, match=r"meta\.json is damaged"):
        TokenStore.open(folder)


@pytest.mark.parametrize("values", [{0: 1}, {-1: 3}, {10: 0}])
def test_borders_that_do_not_divide_the_tokens_are_named(folder: Path, values: dict[int, int]) -> None:
    starts = np.fromfile(folder / "documents.bin", "<u8")
    for index, value in values.items():
        starts[index] = value
    starts.tofile(folder / "documents.bin")
    with pytest.raises(DataError, match=r"documents\.bin does not divide"):
        TokenStore.open(folder)


def test_an_id_beyond_the_vocabulary_is_named_when_it_is_read(folder: Path) -> None:
    tokens = np.fromfile(folder / "tokens.bin", "<u2")
    tokens[100] = 300
    tokens.tofile(folder / "tokens.bin")
    dataset = PackedDataset(TokenStore.open(folder), tokens_per_sample=64)
    with pytest.raises(DataError, match=r"tokens\.bin has id 300 at 100, beyond the vocabulary of 257"):
        list(Loader(dataset, batch_size=4, epochs=1))
