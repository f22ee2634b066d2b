"""Safetensors files that one process fills a tensor at a time, or several ranks at once, each with its own slices.

The head fixes where every tensor lies, so rank 0 lays the files out at full length (which is where a full disk
shows) and every rank then writes the pieces that its sharding rules name, in place. Nobody gathers anything.
Renaming and checksums are the caller's.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel.errors import CheckpointError
from parallel.sharding.rules import Index, Replicated, full_shape_of, rule_of

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
CHUNK = 1 << 22
"""Elements that are written at once."""
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


class SliceFiles:
    """The files of one checkpoint: `lay_out` once, `write` from every rank (or `write_whole` from one), then `sync`."""

    def __init__(self, folder: Path, stem: str, plans: Sequence[TensorPlan], max_bytes: int) -> None:
        self.folder = folder
        files = divide(plans, max_bytes)
        count = len(files)
        self.names = [
            f"{stem}.safetensors" if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
            for i in range(count)
        ]
        self._heads = [header(file) for file in files]
        self._lengths = [
            len(head) + sum(plan.nbytes for plan in file) for head, file in zip(self._heads, files, strict=True)
        ]
        self._places: dict[str, tuple[int, int, TensorPlan]] = {}
        for number, (head, file) in enumerate(zip(self._heads, files, strict=True)):
            start = len(head)
            for plan in file:
                self._places[plan.name] = (number, start, plan)
                start += plan.nbytes
        self.weight_map = {name: self.names[number] for name, (number, _, _) in self._places.items()}
        self.total_bytes = sum(plan.nbytes for plan in plans)

    def lay_out(self) -> None:
        """Rank 0: makes the files, at full length, heads written."""
        for name, head, length in zip(self.names, self._heads, self._lengths, strict=True):
            path = self.folder / name
            try:
                with path.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, length)
                    file.write(head)
            except OSError as error:
                raise CheckpointError(f"cannot make {path} of {length} bytes: {error}") from error

    def write(self, name: str, index: Index, piece: Tensor) -> None:
        """A piece of a tensor, at its place in the full one; a bounded part of it is copied and mapped at a time."""
        rows = max(1, CHUNK * len(piece) // max(1, piece.numel()))
        for first in range(0, len(piece), rows):
            start = index[0].start + first
            part = piece[first : first + rows]
            self._write(name, (slice(start, start + len(part)), *index[1:]), part)

    def _write(self, name: str, index: Index, piece: Tensor) -> None:
        number, start, plan = self._places[name]
        path = self.folder / self.names[number]
        words = WORDS[plan.dtype.itemsize]
        values = piece.detach().cpu().contiguous().view(words).numpy()
        try:
            with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
                full: np.ndarray | None = np.ndarray(plan.shape, values.dtype, mapping, start)
                assert full is not None, "just made"
                full[index] = values
                full = None  # the mapping cannot be closed while an array looks into it
        except OSError as error:
            raise CheckpointError(f"cannot write {name} to {path}: {error}") from error

    def write_whole(self, name: str, tensor: Tensor) -> None:
        """A full tensor at once, of the planned shape and type."""
        number, start, plan = self._places[name]
        assert (plan.shape, plan.dtype) == (tuple(tensor.shape), tensor.dtype), "tensors come as planned"
        path = self.folder / self.names[number]
        try:
            with path.open("r+b") as file:
                file.seek(start)
                file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise CheckpointError(f"cannot write {name} to {path}: {error}") from error

    def sync(self) -> None:
        """Brings what this rank wrote to the disk."""
        for name in self.names:
            fd = os.open(self.folder / name, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def write_index(self) -> None:
        """Rank 0: the index of a checkpoint of several files."""
        if len(self.names) > 1:
            stem = self.names[0].split("-00001-of-")[0]
            table = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.weight_map}
            (self.folder / f"{stem}.safetensors.index.json").write_text(
                json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )


Range = tuple[int, int]


def owned_pieces(
    parameter: Tensor, local: Tensor, rank: int, elements: Range | None = None
) -> Iterator[tuple[Index, Tensor]]:
    """What a rank writes of a tensor sharded like `parameter`: index ranges of the full tensor, and this rank's part
    of them. With `elements` it has only those of its shard, in the order of memory, and `local` is flat.

    What several ranks hold is written by the one that answers for it.
    """
    shape, dim, owned = parameter.shape, _divided(parameter), _owned(rule_of(parameter), rank)
    blocks = [(local, tuple(slice(0, n) for n in shape))]
    if elements is not None:
        blocks = [
            (local[low:high].view([s.stop - s.start for s in at]), at) for low, high, at in _runs(shape, elements)
        ]
    start = 0
    for number, index in enumerate(_pieces(parameter, rank)):
        width = index[dim].stop - index[dim].start
        first, last = owned[number] if owned else (0, width)
        for values, at in blocks:
            low, high = max(at[dim].start, start + first), min(at[dim].stop, start + last)
            if low < high:
                shift = [own.start for own in index]
                shift[dim] -= start
                kept = [slice(low, high) if d == dim else at[d] for d in range(len(shape))]
                place = tuple(slice(own.start + by, own.stop + by) for own, by in zip(kept, shift, strict=True))
                yield place, values.narrow(dim, low - at[dim].start, high - low)
        start += width


def _divided(parameter: Tensor) -> int:
    """The dimension along which ranks hold parts."""
    rule = rule_of(parameter)
    return 0 if isinstance(rule, Replicated) else rule.dim


def _pieces(parameter: Tensor, rank: int) -> Sequence[Index]:
    rule = rule_of(parameter)
    if isinstance(rule, Replicated):
        return [tuple(slice(0, n) for n in parameter.shape)] if rank == 0 else []
    return rule.pieces(full_shape_of(parameter), rank)


def _runs(shape: Sequence[int], elements: Range) -> Iterator[tuple[int, int, Index]]:
    """Elements of a vector or a matrix as boxes: part of a row, whole rows, part of a row; with their places among the
    elements.
    """
    first, last = elements
    low, columns = first, shape[-1] if len(shape) > 1 else 1
    assert len(shape) <= 2, "parameters are vectors and matrices"
    while low < last:
        row, column = divmod(low, columns)
        if column or last - low < columns:
            high = min(last, (row + 1) * columns)
            box: Index = (slice(row, row + 1), slice(column, column + high - low))
        else:
            high = low + (last - low) // columns * columns
            box = (slice(row, high // columns), slice(0, columns))
        yield low - first, high - first, box[: len(shape)]
        low = high


def _owned(rule: object, rank: int) -> list[Range]:
    """What the rank writes of each piece of a tensor of several blocks, counted from the piece's start."""
    return [part.own(rank) for part in getattr(rule, "parts", ())]
