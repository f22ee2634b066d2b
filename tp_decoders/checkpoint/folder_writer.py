"""Writing a checkpoint folder: safetensors files filled one tensor at a time, an index where there are several,
config and tokenizer.

Everything is written beside the target and renamed at the end, so that a reader finds a complete folder or none.
Errors of the disk are remembered and reported by `finish`, because the ranks must go on with their collectives until
then. Knows nothing of sharding.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tp_decoders.checkpoint.config_writer import config_to_write
from tp_decoders.files.companion_files import companions, copy_files
from tp_decoders.model.config import DecoderConfig

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written: its name, full shape and type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def divide(plans: Sequence[TensorPlan], max_bytes: int) -> list[list[TensorPlan]]:
    """Consecutive tensors in files of at most max_bytes, at least one in each."""
    files: list[list[TensorPlan]] = []
    room = 0
    for plan in plans:
        if not files or plan.nbytes > room:
            files.append([])
            room = max_bytes
        files[-1].append(plan)
        room -= plan.nbytes
    return files


def header(plans: Sequence[TensorPlan]) -> bytes:
    """The head of a safetensors file: its length, then names, types, shapes and offsets as JSON."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for plan in plans:
        table[plan.name] = {
            "dtype": DTYPE_NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [start, start + plan.nbytes],
        }
        start += plan.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class FolderWriter:
    """Writes the planned tensors, which arrive in the planned order."""

    def __init__(self, target: Path, plans: Sequence[TensorPlan], max_bytes: int) -> None:
        self.target = target
        self.draft = target.with_name(f"{target.name}.part-{os.getpid()}")
        self.files = divide(plans, max_bytes)
        self.error: str | None = None
        self._open: BinaryIO | None = None
        self._left: list[TensorPlan] = []
        self._opened = 0
        self._dtype = plans[0].dtype

    def file_name(self, number: int) -> str:
        return (
            "model.safetensors"
            if len(self.files) == 1
            else f"model-{number + 1:05d}-of-{len(self.files):05d}.safetensors"
        )

    def start(self) -> str | None:
        """Makes the draft folder; what is wrong, if anything is."""
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            self.error = f"{self.target} exists and is not an empty folder; save to a new one"
            return self.error
        try:
            self.draft.mkdir(parents=True)
        except OSError as error:
            self.error = f"cannot write a checkpoint to {self.target}: {error}"
        return self.error

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends a full tensor; after a failure, does nothing."""
        if self.error is not None:
            return
        try:
            self._append(name, tensor)
        except OSError as error:
            self.error = f"cannot write {name} to {self.target}: {error}"

    def _append(self, name: str, tensor: Tensor) -> None:
        if not self._left:
            self._left = list(self.files[self._opened])
            self._open = (self.draft / self.file_name(self._opened)).open("wb")
            self._open.write(header(self._left))
            self._opened += 1
        plan, out = self._left.pop(0), self._open
        assert out is not None and (plan.name, plan.shape, plan.dtype) == (name, tuple(tensor.shape), tensor.dtype), (
            "tensors come as planned"
        )
        out.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        if not self._left:
            self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._open.flush()
            os.fsync(self._open.fileno())
            self._open.close()
            self._open = None

    def finish(self, config: DecoderConfig, source: Path | None) -> str | None:
        """Adds config.json and the companions of `source`, renames the draft; what went wrong, if anything did."""
        try:
            if self.error is None:
                self._write_json("config.json", config_to_write(config, self._dtype))
                self._write_index()
                if source is not None:
                    copy_files(companions(source), self.draft)
                os.replace(self.draft, self.target)
        except OSError as error:
            self.error = f"cannot finish the checkpoint {self.target}: {error}"
        finally:
            self._close_quietly()
        return self.error

    def _close_quietly(self) -> None:
        if self._open is not None:
            self._open.close()
        if self.error is not None:
            shutil.rmtree(self.draft, ignore_errors=True)

    def _write_index(self) -> None:
        if len(self.files) > 1:
            weight_map = {plan.name: self.file_name(i) for i, plans in enumerate(self.files) for plan in plans}
            total = sum(plan.nbytes for plans in self.files for plan in plans)
            self._write_json(
                "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
            )

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        (self.draft / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
