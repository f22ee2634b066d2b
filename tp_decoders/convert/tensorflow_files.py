"""The variables of a TensorFlow checkpoint ("V2": PREFIX.index and PREFIX.data-*), without TensorFlow.

The index is a table sorted by name in LevelDB's format: blocks of entries whose names leave out what they share with
the one before, a block that points at them, a footer. Each entry says, as a protobuf message, where the variable's
bytes lie. Everything that has a checksum is checked. Knows no model. Compressed tables, which TensorFlow does not
write, partitioned and string variables are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from torch import Tensor

from parallel.errors import CheckpointError
from tp_decoders.convert.tensorflow_index_pb2 import Entry, Header

MAGIC = 0xDB4775248B80FB57
FOOTER, TRAILER = 48, 5
DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16, 19: torch.float16}


def masked_crc32c(data: bytes | NDArray[np.uint8]) -> int:
    """The checksum of bytes (an array of them must be read-only) as TensorFlow and LevelDB store it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class Malformed(CheckpointError):
    """Bytes that are not what the format says; the caller knows the file."""


@dataclass(frozen=True)
class Variable:
    """Where a variable lies, and what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int


class TensorFlowFiles:
    """A checkpoint's variables by name. Opening reads the index; `read` maps one variable and checks it."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.index = prefix.with_name(prefix.name + ".index")
        self.variables, self._num_shards = _read_index(self.index)
        for name, variable in self.variables.items():
            self._check(name, variable)

    def read(self, name: str) -> Tensor:
        """A copy of one variable."""
        variable = self.variables[name]
        path = self._data_file(variable.shard)
        if not variable.size:
            return torch.empty(variable.shape, dtype=variable.dtype)
        mapped = np.memmap(path, np.uint8, "r", variable.offset, (variable.size,))
        if masked_crc32c(mapped) != variable.checksum:
            raise CheckpointError(
                f"{path}: the checksum of {name} is wrong, its bytes are damaged; fetch the file again"
            )
        return torch.from_numpy(np.array(mapped)).view(variable.dtype).reshape(variable.shape)

    def _data_file(self, shard: int) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.data-{shard:05d}-of-{self._num_shards:05d}")

    def _check(self, name: str, variable: Variable) -> None:
        path, stop = self._data_file(variable.shard), variable.offset + variable.size
        if not path.is_file():
            raise CheckpointError(f"{path} is not there; {self.index} says that it holds {name}: fetch it")
        if path.stat().st_size < stop:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes and should have at least {stop}, where {name} ends; fetch it "
                "again"
            )
        if prod(variable.shape) * variable.dtype.itemsize != variable.size:
            raise CheckpointError(
                f"{self.index}: {name} is said to have {variable.size} bytes, which its shape {list(variable.shape)} "
                f"of {variable.dtype} does not; fetch the file again"
            )


def _read_index(path: Path) -> tuple[dict[str, Variable], int]:
    """The variables and the number of data files."""
    try:
        data = path.read_bytes()
        table = dict(_table(data))
        num_shards = _num_shards(table.pop(b""))
        whole = {key.decode(): value for key, value in table.items() if not key.startswith(b"\0")}  # others are slices
        return {name: _variable(name, value) for name, value in whole.items()}, num_shards
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, IndexError, KeyError, DecodeError) as error:
        reason = str(error) if isinstance(error, Malformed) else f"damaged ({error!r})"
        raise CheckpointError(
            f"{path} is not the index of a TensorFlow checkpoint that can be read: {reason}; give the .index file that "
            "tf.train.Saver wrote, or fetch it again"
        ) from error


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The entries of an SSTable."""
    if len(data) < FOOTER or int.from_bytes(data[-8:], "little") != MAGIC:
        raise Malformed(f"its {len(data)} bytes do not end with the table's magic number")
    _, _, at = _handle(data, len(data) - FOOTER)  # of the block of filters, which is empty
    start, size, _ = _handle(data, at)
    for _, handle in _entries(_block(data, start, size)):
        start, size, _ = _handle(handle, 0)
        yield from _entries(_block(data, start, size))


def _handle(data: bytes, at: int) -> tuple[int, int, int]:
    """A block's offset and size, and where the handle ends."""
    start, at = _varint(data, at)
    size, at = _varint(data, at)
    return start, size, at


def _block(data: bytes, start: int, size: int) -> bytes:
    """A block without its trailer (how it is compressed, and a checksum)."""
    content, trailer = data[start : start + size + 1], data[start + size : start + size + TRAILER]
    if len(trailer) < TRAILER:
        raise Malformed(f"it ends within the block at byte {start}")
    if masked_crc32c(content) != int.from_bytes(trailer[1:], "little"):
        raise Malformed(f"the checksum of the block at byte {start} is wrong")
    if trailer[0] != 0:
        raise Malformed(f"the block at byte {start} is compressed (type {trailer[0]}), which is not supported")
    return content[:-1]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Names and values: each entry is [shared, own, value length], the rest of the name, the value."""
    stop = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")  # restart points and their number
    at, key = 0, b""
    while at < stop:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + own]
        at += own + length
        if at > stop:
            raise Malformed("an entry runs past its block")
        yield key, block[at - length : at]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits per byte, and where it ends."""
    value = 0
    for place in range(10):
        byte = data[at + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise Malformed(f"the number at byte {at} has no end")


def _num_shards(header: bytes) -> int:
    message = Header.FromString(header)
    if message.endianness:
        raise Malformed("its numbers are big-endian, which is not supported")
    return message.num_shards or 1


def _variable(name: str, entry: bytes) -> Variable:
    message = Entry.FromString(entry)
    if message.slices:
        raise Malformed(f"{name} is partitioned into slices, which is not supported")
    if message.dtype not in DTYPES:
        raise Malformed(f"{name} is of data type {message.dtype}; supported are {sorted(DTYPES)} (floats, integers)")
    shape = tuple(dim.size for dim in message.shape.dim)
    if min(message.shard_id, message.offset, message.size, *shape) < 0:
        raise Malformed(f"{name} has a negative size, offset or file number")
    return Variable(DTYPES[message.dtype], shape, message.shard_id, message.offset, message.size, message.crc32c)
