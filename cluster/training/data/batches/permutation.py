"""A shuffle that is a formula: the i-th element of a permutation of n, with no table and no other element computed.

A Feistel network over pairs (l, r), l < a, r < b, a*b just above n, whose rounds add a keyed mix of one half to the
other in turn (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, their third method); results beyond n
are sent through again (cycle walking) and, as a*b - n < a, hardly ever occur. Pinned by a test: changing it would
change the order of every run in progress.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 8


def key_words(*parts: object, count: int = NUM_ROUNDS) -> NDArray[np.uint64]:
    """64-bit keys drawn from a purpose, a seed and the like."""
    text = "/".join(map(str, parts)).encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=8 * count).digest(), "<u8").astype(np.uint64)


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


@dataclass(frozen=True)
class Permutation:
    """A permutation of range(size), chosen by seed and epoch."""

    size: int
    seed: int
    epoch: int

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The elements at some positions."""
        keys = key_words("shuffle", self.seed, self.epoch)
        found = self._once(positions.astype(np.uint64), keys)
        while (outside := found >= np.uint64(self.size)).any():
            found[outside] = self._once(found[outside], keys)
        return found.astype(np.int64)

    def _once(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        root = math.isqrt(self.size - 1) + 1
        a, b = np.uint64(root), np.uint64(-(-self.size // root))
        left, right = values % a, values // a
        for index, key in enumerate(keys):
            if index % 2 == 0:
                left = (left + mix64(right ^ key) % a) % a
            else:
                right = (right + mix64(left ^ key) % b) % b
        whole: NDArray[np.uint64] = left + a * right
        return whole
