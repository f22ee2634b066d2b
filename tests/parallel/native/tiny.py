"""A library of one tiny source, for tests of how libraries are built, kept and loaded."""

from __future__ import annotations

from pathlib import Path

from parallel.native.compiled import library

SOURCE = """
static int threads = 1;
extern "C" void pool_set_threads(int n) { threads = n; }
extern "C" int pool_num_threads() { return threads; }
extern "C" int tiles_enable(char*, long long) { return 1; }
extern "C" int tiny_answer() { return 42; }
"""


def fresh(cache: Path | None, threads: int = 1) -> None:
    """Forget the loaded library, as a new process would."""
    library._loaded = library._Loaded()
    library.configure(cache_dir=cache, threads=threads)
