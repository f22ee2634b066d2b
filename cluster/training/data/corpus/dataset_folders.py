"""Which files a Hugging Face dataset folder is made of, without the `datasets` library.

Two kinds: what `datasets.save_to_disk` writes (state.json lists the Arrow files; dataset_dict.json the splits), and a
folder of parquet shards named as on the Hub (train-00000-of-00002.parquet, or a folder per split). Several splits are
never mixed unasked.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cluster.training.data.corpus.document import DataError

SPLIT_NAMES = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
SHARD_NAME = re.compile(r"^(?P<split>\w+?)-\d{5}-of-\d{5}(-\w+)?$")


def is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def saved_files(folder: Path, split: str | None) -> list[Path]:
    """The Arrow files of a folder written by `datasets.save_to_disk`, in their order."""
    if (folder / "dataset_dict.json").is_file():
        folder = folder / choose_split(folder, list(_read(folder / "dataset_dict.json").get("splits", [])), split)
    elif split is not None:
        raise DataError(f"{folder} holds one dataset, not splits; leave out the split ({split!r})")
    state = _read(folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            f"{folder} keeps its rows' order in an indices file; call flatten_indices() before save_to_disk()"
        )
    files = [folder / entry["filename"] for entry in state.get("_data_files", [])]
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is missing, which {folder / 'state.json'} lists; copy the folder again")
    return files


def shard_files(folder: Path, paths: list[Path], split: str | None) -> list[Path]:
    """Those of a folder's parquet files that belong to one split; all of them where the names tell no splits apart."""
    splits = {path: _split_of(path.relative_to(folder)) for path in paths}
    names = sorted({name for name in splits.values() if name is not None})
    if split is None and len(names) <= 1:
        return paths
    chosen = choose_split(folder, names, split)
    return [path for path in paths if splits[path] == chosen]


def choose_split(folder: Path, names: list[str], split: str | None) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split not in names:
        given = "no split was given" if split is None else f"there is no split {split!r}"
        raise DataError(f"{folder} has the splits {sorted(names)} and {given}; choose one of them (split=...)")
    return split


def _split_of(name: Path) -> str | None:
    """train-00000-of-00002.parquet and train/0000.parquet belong to "train"."""
    if match := SHARD_NAME.match(name.stem):
        return match["split"]
    return next((part for part in (name.stem, *reversed(name.parts[:-1])) if part in SPLIT_NAMES), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; a saved dataset folder has it") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} should hold a JSON object, not {type(found).__name__}")
    return found
