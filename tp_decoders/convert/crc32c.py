"""CRC-32C (Castagnoli), the checksum of TensorFlow's files, fast enough for gigabytes without a compiled library.

A block is cut into lanes whose checksums advance side by side, four bytes at a time; neighbouring lanes are then joined
in pairs. Joining works because a checksum is linear over bits: that of A followed by B is that of A moved on by B's
length, which is a 32 x 32 bit matrix, xor that of B.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Bytes = NDArray[np.uint8]
POLYNOMIAL = 0x82F63B78
LANE = 256  # bytes; a power of two, as BLOCK is
BLOCK = 1 << 22
ONES = 0xFFFFFFFF


def _one_byte(values: Words) -> Words:
    """Checksums moved on by one zero byte."""
    for _ in range(8):
        values = (values >> np.uint32(1)) ^ (values & np.uint32(1)) * np.uint32(POLYNOMIAL)
    return values


def _times(matrix: Words, values: Words) -> Words:
    """A matrix, given as what it makes of each single bit, times each value."""
    result = np.zeros_like(values)
    for bit in range(32):
        result ^= matrix[bit] * ((values >> np.uint32(bit)) & np.uint32(1))
    return result


def _doublings(count: int) -> list[Words]:
    """The matrices that move a checksum on by 1, 2, 4, ... zero bytes."""
    matrices = [_one_byte(np.uint32(1) << np.arange(32, dtype=np.uint32))]
    while len(matrices) < count:
        matrices.append(_times(matrices[-1], matrices[-1]))
    return matrices


def _four_bytes() -> list[Words]:
    """For each byte of a word, what it becomes four bytes later."""
    step = _one_byte(np.arange(256, dtype=np.uint32))
    tables = [step]
    for _ in range(3):
        tables.append(_one_byte(tables[-1]))
    return tables[::-1]


MOVES = _doublings(BLOCK.bit_length())
TABLES = _four_bytes()


def masked_crc32c(data: Bytes) -> int:
    """The checksum as TensorFlow and LevelDB store it: rotated and moved, so that it may itself be checksummed."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & ONES


def crc32c(data: Bytes) -> int:
    """The checksum of flat bytes."""
    state, start = ONES, 0
    for stop in [*range(data.size % BLOCK, data.size, BLOCK), data.size]:
        if stop > start:
            state = _moved(state, stop - start) ^ _block(data[start:stop])
            start = stop
    return state ^ ONES


def _moved(state: int, num_bytes: int) -> int:
    values = np.array([state], np.uint32)
    for power, matrix in enumerate(MOVES):
        if num_bytes >> power & 1:
            values = _times(matrix, values)
    return int(values[0])


def _block(data: Bytes) -> int:
    """The checksum, from a state of zero, of at most BLOCK bytes; zeros in front do not change it."""
    num_lanes = 1 << max(0, -(-data.size // LANE) - 1).bit_length()
    padded = np.zeros(num_lanes * LANE, np.uint8)
    padded[padded.size - data.size :] = data
    words = np.ascontiguousarray(padded.view("<u4").reshape(num_lanes, LANE // 4).T)
    state = np.zeros(num_lanes, np.uint32)
    for word in words:
        state = state ^ word
        state = (
            TABLES[0][state & 255]
            ^ TABLES[1][state >> 8 & 255]
            ^ TABLES[2][state >> 16 & 255]
            ^ TABLES[3][state >> 24]
        )  # fmt: skip
    power = LANE.bit_length() - 1
    while len(state) > 1:
        state = _times(MOVES[power], state[0::2]) ^ state[1::2]
        power += 1
    return int(state[0])
