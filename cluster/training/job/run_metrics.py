"""A run's records: lines of JSON that a resumed run continues without a gap or a doubled line, and TensorBoard's files.

Rank 0 writes; anybody reads, at any moment. A line belongs to a step: what was written after the step that is resumed
from is cut off, as those steps are taken again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError

SCALARS = {
    "loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate",
    "tokens_per_s": "speed/tokens_per_s", "mfu": "speed/mfu", "eval_loss": "eval/loss",
}  # fmt: skip
"""What of a step goes to TensorBoard, and under which name."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of records; a killed job may have left half a last one."""
    return RecordReader(path).fresh()


class RecordReader:
    """Reads a file of records as it grows, each line once; one that is cut back is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: int | None = None
        self._offset = 0

    def fresh(self) -> list[dict[str, Any]]:
        """The complete lines that were not returned before."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            identity = os.fstat(file.fileno()).st_ino
            if identity != self._identity:
                self._identity, self._offset = identity, 0
            file.seek(self._offset)
            *lines, _ = file.read().split(b"\n")  # other characters that end a line may be in a text
        self._offset += sum(len(line) + 1 for line in lines)
        return [json.loads(line) for line in lines]


class Records:
    """A file of records, cut back to the step that is resumed from; a line is there as soon as it is written."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_records(path) if line["step"] <= step]
        draft = path.with_name(f".{path.name}.part")
        draft.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        os.replace(draft, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def check_tensorboard() -> None:
    """An error where TensorBoard's files cannot be written."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard is true, but the package of that name is not installed; pip install 'tp-decoders[train]', or "
            "set tensorboard=false"
        )


class TensorBoard:
    """TensorBoard's files of a run: numbers of every step, and what the model said."""

    def __init__(self, folder: Path, step: int) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)  # TensorBoard hides later ones of earlier files

    def write(self, record: Mapping[str, Any]) -> None:
        """A step's numbers."""
        for name, tag in SCALARS.items():
            if name in record:
                self._writer.add_scalar(tag, record[name], int(record["step"]))
        self._writer.flush()

    def write_sample(self, record: Mapping[str, Any]) -> None:
        """A prompt's continuation; one row per prompt."""
        text = f"**{record['prompt']}**{record['text']}"
        self._writer.add_text(f"samples/{record['index']}", text, int(record["step"]))

    def close(self) -> None:
        self._writer.close()
