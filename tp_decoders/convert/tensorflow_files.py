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

import numpy as np
import torch
from torch import Tensor

from parallel.errors import CheckpointError
from tp_decoders.convert.crc32c import masked_crc32c

MAGIC = 0xDB4775248B80FB57
FOOTER, TRAILER = 48, 5
DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16, 19: torch.float16}
VARINT, FIXED64, TEXT, FIXED32 = 0, 1, 2, 5


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
        num_shards = _header(table.pop(b""))
        whole = {key.decode(): value for key, value in table.items() if not key.startswith(b"\0")}  # others are slices
        return {name: _variable(name, value) for name, value in whole.items()}, num_shards
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, IndexError, KeyError) as error:
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
    if masked_crc32c(np.frombuffer(content, np.uint8)) != int.from_bytes(trailer[1:], "little"):
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
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The numbers and values of a protobuf message's fields."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        length = {FIXED64: 8, FIXED32: 4}.get(kind, 0)
        if kind == TEXT:
            length, at = _varint(message, at)
        elif not length:
            raise Malformed(f"a field of wire type {kind}")
        content = message[at : at + length]
        at += length
        yield tag >> 3, content if kind == TEXT else int.from_bytes(content, "little")


def _header(message: bytes) -> int:
    """The number of data files, of BundleHeaderProto."""
    fields = dict(_fields(message))
    if fields.get(2, 0) != 0:
        raise Malformed("its numbers are big-endian, which is not supported")
    return int(fields.get(1, 1))


def _variable(name: str, message: bytes) -> Variable:
    """Of BundleEntryProto."""
    fields = dict(_fields(message))
    if 7 in fields:
        raise Malformed(f"{name} is partitioned into slices, which is not supported")
    kind = int(fields.get(1, 0))
    if kind not in DTYPES:
        raise Malformed(f"{name} is of data type {kind}; supported are {sorted(DTYPES)} (floats, integers)")
    shape = fields.get(2, b"")
    if not isinstance(shape, bytes):
        raise Malformed(f"the shape of {name} is no message")
    shard, offset, size, checksum = (int(fields.get(number, 0)) for number in (3, 4, 5, 6))
    return Variable(DTYPES[kind], _shape(shape), shard, offset, size, checksum)


def _shape(message: bytes) -> tuple[int, ...]:
    """Of TensorShapeProto: one field 2 per dimension, its size in field 1."""
    dims = [dict(_fields(value)) for number, value in _fields(message) if number == 2 and isinstance(value, bytes)]
    return tuple(int(dim.get(1, 0)) for dim in dims)
