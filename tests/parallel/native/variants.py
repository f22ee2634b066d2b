"""What every kernel gives with one instruction set, compared with what it gives with another.

    python -m tests.parallel.native.variants             all that this CPU runs, and AMX emulated, against the best
    python -m tests.parallel.native.variants --print     digests of the one that TPD_NATIVE_ISA names, as JSON

A variant is the whole library, compiled with few optimisations, where kernels are always kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from parallel.native.compiled import instruction_set, library
from tests.parallel.native import attention_digest, kernel_digests, order_model
from tests.parallel.quantisation import quantised_digests

ROOT = Path(__file__).parents[3]
FLAGS = ("-O1",)
Digests = dict[str, str]


def digests() -> Digests:
    """Of this process's library; its bfloat16 products equal the model of their order, or AssertionError."""
    order_model.check()
    return attention_digest.digests() | kernel_digests.digests() | quantised_digests.digests()


def under(name: str) -> Digests:
    """Those of another instruction set, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.native.variants", "--print"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, instruction_set.VARIABLE: name}, timeout=600, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise AssertionError(f"{name}: {done.stderr}")
    found: Digests = json.loads(done.stdout)
    return found


def different(found: Digests, wanted: Digests) -> list[str]:
    """Names of what differs, or is there once only."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="of this process's instruction set alone")
    if parser.parse_args().print:
        library.configure(flags=FLAGS)
        print(json.dumps(digests()))
        return 0
    wanted, failed = digests(), 0
    for name in (*instruction_set.runnable(), instruction_set.EMULATED):
        found = different(under(name), wanted)
        failed += bool(found)
        print(f"{name}: {f'DIFFERENT: {found}' if found else f'the same {len(wanted)} digests'}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
