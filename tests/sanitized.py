"""The native tests over kernels built with address and undefined-behaviour sanitisers: `make sanitize`.

    python -m tests.sanitized build     compiles them
    python -m tests.sanitized test ...  runs tests, with the sanitiser's runtime preloaded (Python is built without it)

Every fault ends the process that has it, the sanitiser's report on the terminal (hence --capture=sys). libstdc++ is
preloaded with the runtime, which looks for what throws when it starts. Nothing of our own code is suppressed;
detect_leaks=0 in the Makefile is for Python, which keeps memory until it ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from parallel.native.compiled import build, library

FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TESTS = (
    "tests/parallel/native",
    "tests/parallel/ranks/test_comm.py",
    "tests/parallel/attention/test_attend.py",
    "tests/parallel/matmul/test_products.py",
    "tests/parallel/layers/test_dropout.py",
    "tests/parallel/attention/test_kv_cache.py",
    "tests/parallel/replay",
)


def main(arguments: list[str]) -> int:
    action, *chosen = arguments
    root = Path(__file__).parents[1]
    library.configure(cache_dir=root / "parallel" / "native" / "src" / "_build" / "sanitized", flags=FLAGS)
    if action == "build":
        build.BUILD_SECONDS = 1800.0  # instrumented code compiles slowly
        print(library.prebuild())
        return 0
    return int(pytest.main(["-q", "-x", "--capture=sys", "-p", "no:cacheprovider", *(chosen or TESTS)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
