"""A recorded sequence of kernel calls, replayed by one call of program.cpp without the interpreter lock.

Nothing in it follows the tensors that were there when it was recorded: it calls with the same addresses. They stay
alive as long as the program does, and what changes from replay to replay is written to them before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

from parallel.native.compiled.library import Entry, entry, library

MOST_ARGUMENTS = 16
_KINDS = {
    ctypes.c_void_p: "p", ctypes.c_char_p: "p", ctypes.c_int: "i", ctypes.c_int64: "l", ctypes.c_float: "f",
}  # fmt: skip


StructureT = TypeVar("StructureT", bound=ctypes.Structure)


class _Word(ctypes.Union):
    _fields_ = (("p", ctypes.c_void_p), ("l", ctypes.c_int64), ("d", ctypes.c_double))


class _Node(ctypes.Structure):
    """Node of program.cpp."""

    _fields_ = (("function", ctypes.c_void_p), ("kind", ctypes.c_int64), ("arguments", _Word * MOST_ARGUMENTS))


class Node:
    """One call: what the program makes of an entry and its arguments, and what keeps these alive."""

    def __init__(self, called: Entry, arguments: tuple[Any, ...]) -> None:
        self.name, self.keep = called.name, arguments
        signature = "".join(_letter(kind) for kind in called.argtypes)
        kind = _kind(signature)
        if kind < 0:
            raise NotRecordable(f"{called.name} takes {signature!r}, which program.cpp has no call for")
        self.struct = _Node(called.address, kind)
        for place, (letter, value) in enumerate(zip(signature, arguments, strict=True)):
            word = self.struct.arguments[place]
            if letter == "p":
                word.p = _address(called, value)
            elif letter == "f":
                word.d = value
            else:
                word.l = int(value)


class NotRecordable(Exception):
    """Something that a program cannot hold."""


class Program:
    """Nodes in their order. `keep`: whatever their addresses point into."""

    def __init__(self, nodes: Sequence[Node], keep: Sequence[object], nbytes: int) -> None:
        self._nodes = (_Node * len(nodes))(*(node.struct for node in nodes))
        self._keep = tuple(node.keep for node in nodes), tuple(keep)
        self._reached = ctypes.c_int64()
        self.names, self.nbytes = tuple(node.name for node in nodes), nbytes

    def __len__(self) -> int:
        return len(self.names)

    def replay(self) -> int:
        """Status.OK, or that of the node that failed, `reached`: what comes after it was not computed."""
        return int(_replay()(self._nodes, len(self._nodes), ctypes.byref(self._reached)))

    @property
    def reached(self) -> int:
        """How many nodes of the last replay were computed."""
        return self._reached.value

    def structures(self, kind: type[StructureT]) -> dict[int, StructureT]:
        """By the numbers of the nodes that point to one of that kind: what they point to."""
        calls = enumerate(self._keep[0])
        return {i: given for i, arguments in calls for given in arguments if isinstance(given, kind)}


def _letter(kind: Any) -> str:
    return "p" if issubclass(kind, ctypes._Pointer) else _KINDS.get(kind, "?")


def _address(called: Entry, value: object) -> int | None:
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, ctypes.Structure):
        return ctypes.addressof(value)
    if isinstance(value, bytes):
        return ctypes.cast(ctypes.c_char_p(value), ctypes.c_void_p).value
    raise NotRecordable(f"{called.name} was given a {type(value).__name__} for a pointer")


@cache
def _kind(signature: str) -> int:
    function = library().program_kind
    function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int64
    return int(function(signature.encode()))


@cache
def _replay() -> Entry:
    return entry("program_replay", (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p), ctypes.c_int)
