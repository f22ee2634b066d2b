"""Which of a CPU's instructions the kernels are compiled for: one name, decided here for everybody in this process.

The sources are the same for all names and so are the bits of matrix products; what differs is speed. The environment's
TPD_NATIVE_ISA forces a name, so that every process of a run inherits it; a name that this CPU cannot run is refused.
`amx` is the library of `avx512` with tiles switched on, once a product of theirs was tried (library.py).
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from parallel.errors import ConfigError

VARIABLE = "TPD_NATIVE_ISA"
BFLOAT16_ORDER = "amx32"
"""Version of the order in which bfloat16 products are summed (src/bf16_order.h); another order, another name."""

_BASE = ("avx2", "fma")
_WIDE = (*_BASE, "avx512f", "avx512bw", "avx512vl", "avx512dq")
_NEEDED = {
    "amx": (*_WIDE, "amx_tile", "amx_bf16"),
    "avx512_bf16": (*_WIDE, "avx512_bf16"),
    "avx512": _WIDE,
    "avx2": _BASE,
    "portable": (),
}
NAMES = tuple(_NEEDED)
"""Best first, but for CPUs with AMX, which run vdpbf16ps at half the rate of fused multiply-adds."""
EMULATED = "amx_emulated"
"""A name for tests, never chosen: the kernels of `amx` over tiles in plain C++, on any CPU."""
TILED = {"amx": "avx512", EMULATED: None}
"""Names whose kernels use tiles, and the name that the same library has without."""


def runnable() -> tuple[str, ...]:
    """The names that this CPU can run, the best one first."""
    has = _features()
    names = [name for name, needed in _NEEDED.items() if has.issuperset(needed)]
    if "amx_bf16" in has and "avx512_bf16" in names:
        names.remove("avx512_bf16")
        names.insert(names.index("avx512") + 1, "avx512_bf16")
    return tuple(names)


def forced() -> bool:
    """Whether the environment names one."""
    return bool(os.environ.get(VARIABLE))


def chosen() -> str:
    """The name that counts here: the environment's, else the best."""
    names = runnable()
    wanted = os.environ.get(VARIABLE) or names[0]
    if wanted not in (*NAMES, EMULATED):
        raise ConfigError(f"{VARIABLE} is {wanted!r}; it takes one of {', '.join(NAMES)}")
    if wanted not in (*names, EMULATED):
        raise ConfigError(f"{VARIABLE} is {wanted!r}, which this CPU cannot run; it takes one of {', '.join(names)}")
    return wanted


def flags(name: str) -> tuple[str, ...]:
    """What the compiler is told beside its usual -march=native."""
    tiles = ("-DTPD_EMULATED_TILES",) if name == EMULATED else ()
    if platform.machine() not in ("x86_64", "AMD64"):
        return tiles
    return {
        "amx": ("-mno-avx512bf16",),
        "avx512_bf16": (),
        "avx512": ("-mno-avx512bf16",),
        "avx2": ("-mno-avx512f",),
        "portable": ("-march=x86-64",),
        EMULATED: ("-mno-avx512bf16", *tiles),
    }[name]


def _features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))
