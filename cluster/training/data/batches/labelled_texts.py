"""Labelled texts, one JSON object a line with a text and a label: read once into a folder, dealt whole, one to a row.

    meta.json    the tokenizer's fingerprint, the file's hash, the labels' names, counts
    tokens.npy, starts.npy, labels.npy, hashes.npy

Small enough to be read in one go; the folder gets its name when it is complete. Where its rows stand in the order, who
holds which, and what is held out is decided as for packed text.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.training.data.batches.batch import Batch
from cluster.training.data.batches.eval_split import SplitRule
from cluster.training.data.batches.packing import Row
from cluster.training.data.batches.permutation import Permutation
from cluster.training.data.corpus.document import DataError, NothingHeldOut
from cluster.training.data.corpus.jsonl import text_field
from cluster.training.data.store.tokenizer_fingerprint import Tokenizer, tokenizer_fingerprint
from parallel.errors import ConfigError
from parallel.vocabulary.cross_entropy import IGNORE_INDEX

FORMAT = "tp-decoders labelled texts, version 1"
META = "meta.json"
ARRAYS = ("tokens", "starts", "labels", "hashes")


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Which fields of a line hold text and label, and the labels' names in the order of their ids; without names: those
    of the file, sorted. A label is a name, or its id.
    """

    text_field: str = "text"  # of a line
    label_field: str = "label"  # of a line
    names: tuple[str, ...] = ()  # in the order of their ids; empty: as in the file, sorted


@dataclass(frozen=True, eq=False)
class LabelledStore:
    """An open folder of labelled texts. The arrays are memory-mapped."""

    folder: Path
    meta: dict[str, Any]
    tokens: NDArray[np.uint32]
    starts: NDArray[np.int64]
    labels: NDArray[np.int64]
    hashes: NDArray[np.uint64]

    @staticmethod
    def open(folder: Path) -> LabelledStore:
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no labelled texts: {error}; remove it and start again") from error
        if meta.get("format") != FORMAT:
            raise DataError(f"{folder} is {meta.get('format')!r}, not {FORMAT!r}; choose another folder")
        return LabelledStore(folder, meta, **arrays)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.meta["names"])

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


def store_labelled(path: Path, config: LabelConfig, tokenizer: Tokenizer, folder: Path) -> LabelledStore:
    """The file's texts and labels in `folder`, made now or by an earlier run of the same."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}; give a file of JSON lines") from error
    plan: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "source": hashlib.sha256(data).hexdigest(),
        "fields": [config.text_field, config.label_field],
    }
    if folder.is_dir():
        store = LabelledStore.open(folder)
        differing = [key for key in plan if store.meta.get(key) != plan[key]]
        if differing or (config.names and store.names != config.names):
            raise ConfigError(f"{folder} holds other texts ({' and '.join(differing or ['names'])} differ); remove it")
        return store
    rows = read_rows(data, path, config)
    names = config.names or label_names([label for _, label, _ in rows])
    labels = [label_id(label, names, where) for _, label, where in rows]
    encoded = [_encoded(text, where, tokenizer) for text, _, where in rows]
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text, _, _ in rows]
    arrays: dict[str, NDArray[Any]] = {
        "tokens": np.concatenate(encoded),
        "starts": np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        "labels": np.asarray(labels, np.int64),
        "hashes": np.asarray([int.from_bytes(digest, "little") for digest in digests], np.uint64),
    }
    _write(folder, arrays, plan | {"names": list(names)})
    return LabelledStore.open(folder)


def _write(folder: Path, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> None:
    draft = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(draft / f"{name}.npy", array)
    (draft / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
    os.replace(draft, folder)


def read_rows(data: bytes, path: Path, config: LabelConfig) -> list[tuple[str, str | int, str]]:
    """(text, label, where) of every line that is not blank."""
    rows: list[tuple[str, str | int, str]] = []
    for number, line in enumerate(data.splitlines(), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not valid JSON: {error}; each line should be one whole object") from error
        text = text_field(row, config.text_field, where)
        label = row.get(config.label_field)
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise DataError(f"{where}: field {config.label_field!r} is {label!r}; a label is a name or its number")
        rows.append((text, label, where))
    if not rows:
        raise DataError(f"{path} holds no texts; give JSON lines with a text and a label each")
    return rows


def label_names(labels: Sequence[str | int]) -> tuple[str, ...]:
    """Of labels that are names: these, sorted. Of numbers, which must run from 0: LABEL_0, LABEL_1, ..."""
    if all(isinstance(label, str) for label in labels):
        return tuple(sorted({str(label) for label in labels}))
    found = sorted({label for label in labels if isinstance(label, int)})
    if len(found) < len(set(labels)) or found != list(range(len(found))):
        raise DataError(f"labels are {sorted(map(str, set(labels)))[:8]}; use names, or the numbers 0, 1, 2, ...")
    return tuple(f"LABEL_{i}" for i in found)


def label_id(label: str | int, names: Sequence[str], where: str) -> int:
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    raise DataError(f"{where}: label {label!r} is none of {list(names)[:8]}; add it to labels.names, or mend the line")


def _encoded(text: str, where: str, tokenizer: Tokenizer) -> NDArray[np.uint32]:
    ids = list(tokenizer.encode(text))
    if not ids:
        raise DataError(f"{where} has no text to classify; remove the line")
    return np.asarray(ids, np.uint32)


class LabelledDataset:
    """One part of a store in an order of its own for each epoch; texts longer than `max_tokens` lose their end."""

    def __init__(
        self, store: LabelledStore, *, max_tokens: int, seed: int, split: SplitRule, part: str, shuffle: bool
    ) -> None:
        self.store, self.max_tokens, self.seed, self.shuffle = store, max_tokens, seed, shuffle
        held_out = split.in_eval(np.asarray(store.hashes), np.zeros(len(store.hashes), np.uint64))
        self._texts = np.flatnonzero(held_out if part == "eval" else ~held_out)
        if not len(self._texts):
            kind = NothingHeldOut if part == "eval" else DataError
            raise kind(f"the {part} part of {store.folder} has no text; change corpus.split.eval_fraction")
        self.identity: dict[str, Any] = {
            "tokenizer": store.meta["tokenizer"], "corpus": store.meta["source"], "tokens_per_sample": max_tokens,
            "seed": seed, "shuffle": shuffle, "split": split.to_json(), "part": part, "names": store.meta["names"],
        }  # fmt: skip

    @property
    def num_pieces(self) -> int:
        return len(self._texts)

    def rows(self, epoch: int, start: int, count: int) -> list[Row]:
        """Up to `count` rows of one text from position `start` of an epoch on."""
        stop = min(self.num_pieces, start + count)
        lengths = [len(self._tokens(text)) for text in self._order(epoch, start, stop)]
        return [Row(epoch, start + i, start + i + 1, length, 1) for i, length in enumerate(lengths)]

    def read(self, rows: Sequence[Row], first_sample: int, all_rows: Sequence[Row]) -> Batch:
        """This rank's share `rows` of the global batch `all_rows`."""
        texts = [int(self._order(row.epoch, row.start, row.stop)[0]) for row in rows]
        parts = [torch.from_numpy(self._tokens(text).astype(np.int64)) for text in texts]
        tokens = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
        places = [torch.arange(len(part)) for part in parts]
        return Batch(
            token_ids=tokens,
            targets=torch.full_like(tokens, IGNORE_INDEX),
            positions=torch.cat(places) if places else tokens,
            loss_weights=torch.zeros(len(tokens)),
            lengths=tuple(map(len, parts)),
            sample_documents=(1,) * len(rows),
            first_sample=first_sample,
            global_samples=len(all_rows),
            global_tokens=sum(row.num_tokens for row in all_rows),
            global_weight=len(all_rows),
            labels=torch.from_numpy(np.asarray(self.store.labels[texts], np.int64)),
            documents=tuple(texts),
        )

    def _order(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        positions = np.arange(start, stop, dtype=np.int64)
        chosen: NDArray[np.int64] = self._texts[
            Permutation(self.num_pieces, self.seed, epoch)(positions) if self.shuffle else positions
        ]
        return chosen

    def _tokens(self, text: int) -> NDArray[np.uint32]:
        start, stop = int(self.store.starts[text]), int(self.store.starts[text + 1])
        return self.store.tokens[start : min(stop, start + self.max_tokens)]
