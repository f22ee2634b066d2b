"""The ctypes side of comm.cpp and all_reduce.cpp: argument types and structures, nothing more. What they do together:
parallel.ranks.shared_memory.

Collectives are known to who records (library.Entry). Of these only `comm_step` is a call that a program can hold.
"""

from __future__ import annotations

import ctypes
import functools
from types import SimpleNamespace
from typing import Any

from parallel.native.compiled.library import entry, library

MOST_BEGUN = 4096  # that a ledger remembers; a power of two
_P, _L = ctypes.c_void_p, ctypes.c_int64


class Begun(ctypes.Structure):
    """A collective of a recorded step: when, by CLOCK_MONOTONIC in nanoseconds, and which."""

    _fields_ = (("at", _L), ("kind", _L), ("call", _L), ("nbytes", _L))


class Ledger(ctypes.Structure):
    """Ledger of all_reduce.cpp: what recorded steps did."""

    _fields_ = (("calls", _L), ("begun", _L), ("spent", _L * 16), ("last", Begun * MOST_BEGUN))


class Step(ctypes.Structure):
    """Step of all_reduce.cpp: one sum of a recorded step."""

    _fields_ = (
        ("comm", _P), ("plan", _P), ("kind", _L), ("nodes", _P), ("numel", _L), ("in_type", _L), ("bias", _P),
        ("bias_width", _L), ("bias_type", _L), ("out", _P), ("out_type", _L), ("chunk_bytes", _L), ("split_bytes", _L),
        ("maximum", _L), ("nbytes", _L), ("ledger", _P),
    )  # fmt: skip


@functools.cache
def comm_library() -> SimpleNamespace:
    """The comm_* functions of the native library, their argument types declared."""
    lib = library()
    p, i, u32, u64, i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "comm_bytes": (u64, [i, u64]),
        "comm_attach": (p, [p, i, i, u64]),
        "comm_watch": (None, [p]),
        "comm_limits": (None, [p, i64, i64, i64]),
        "comm_leave": (None, [p, i]),
        "comm_detach": (None, [p]),
        "comm_plan": (p, [i, p, p, i]),
        "comm_plan_free": (None, [p]),
        "comm_slot": (p, [p, u64]),
        "comm_reduce": (i, [p, p, u32, u64, p, i64, i, p, i64, i, p, i, u64, u64, i]),
        "comm_gather": (i, [p, u32, u64, p, u64, p, i, p]),
        "comm_barrier": (i, [p, u32, u64, i64]),
        "comm_send": (i, [p, u32, u64, ctypes.c_char_p, u64, i64]),
        "comm_peek": (i, [p, u32, u64, i64, p]),
        "comm_receive": (i, [p, p, u64, i64]),
        "comm_report": (i, [p, p]),
    }
    found = SimpleNamespace()
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
        setattr(found, name, function)
    for name in ("comm_reduce", "comm_gather", "comm_barrier", "comm_send", "comm_peek", "comm_receive"):
        setattr(found, name, entry(name, tuple(signatures[name][1]), i))
    found.comm_step = entry("comm_step", (ctypes.POINTER(Step),), i)
    return found
