"""The ctypes side of comm.cpp and all_reduce.cpp: argument types, nothing more. What they do together:
parallel.ranks.shared_memory.
"""

from __future__ import annotations

import ctypes
import functools

from parallel.native.compiled.library import library


@functools.cache
def comm_library() -> ctypes.CDLL:
    """The native library with the argument types of the comm_* functions declared."""
    lib = library()
    p, i, u32, u64, i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64
    signatures = {
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
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
