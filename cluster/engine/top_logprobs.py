"""The likeliest tokens of one place, eight bytes each: answers may hold millions, a pair of Python floats takes 130."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

Pair = tuple[int, float]
SIZE = 4
"""Bytes of an id, and of a log-probability."""


class Alternatives(Sequence[Pair]):
    """Token ids and log-probabilities in float32, best first. Compares and reads as a tuple of pairs."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        """All ids, then all log-probabilities, as this machine writes them. ValueError where those are not as many."""
        if len(data) % (2 * SIZE):
            raise ValueError(f"{len(data)} bytes are no pairs of {SIZE} bytes each")
        self.data = data

    @classmethod
    def of(cls, pairs: Iterable[Pair]) -> Alternatives:
        pairs = list(pairs)
        return cls(array("I", [i for i, _ in pairs]).tobytes() + array("f", [v for _, v in pairs]).tobytes())

    @property
    def ids(self) -> array[int]:
        return array("I", self.data[: len(self.data) // 2])

    @property
    def logprobs(self) -> array[float]:
        return array("f", self.data[len(self.data) // 2 :])

    def __len__(self) -> int:
        return len(self.data) // (2 * SIZE)

    def __iter__(self) -> Iterator[Pair]:
        return zip(self.ids, self.logprobs, strict=True)

    @overload
    def __getitem__(self, place: int) -> Pair: ...

    @overload
    def __getitem__(self, place: slice) -> Alternatives: ...

    def __getitem__(self, place: int | slice) -> Pair | Alternatives:
        if isinstance(place, slice):
            return Alternatives(self.ids[place].tobytes() + self.logprobs[place].tobytes())
        return self.ids[place], self.logprobs[place]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Alternatives):
            return self.data == other.data
        return isinstance(other, tuple) and tuple(self) == other

    def __hash__(self) -> int:
        return hash(self.data)

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> tuple[type[Alternatives], tuple[bytes]]:
        return Alternatives, (self.data,)


NO_ALTERNATIVES = Alternatives(b"")
