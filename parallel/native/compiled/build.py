"""Compiles the C++ sources of src/ into one shared library.

The file's name hashes the sources, the flags, the compiler and the CPU's model and flags: a cache shared by unlike
machines never hands one of them foreign code, and a changed source is a new file. It ends with its own digest, so that
a damaged one is known. Several processes starting at once compile once. Where the file is kept: kernel_cache.py; who
loads it: library.py.
"""

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from parallel.errors import NativeUnavailable

SOURCES = Path(__file__).parents[1] / "src"
# No -ffast-math and no contraction: one formula gives the same bits in the middle, the tail and every inlined copy.
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility-inlines-hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)  # the last two: false alarms inside gcc 12's own intrinsics
BUILD_SECONDS = 600.0  # one minute of a quiet machine's time; a busy one takes long, and only a hung compiler forever
FEWEST_AT_ONCE = 4  # compilers of 300 MB each; as many as there are CPUs where those are more
DIGEST_BYTES = hashlib.sha256().digest_size


def file_name(flags: Sequence[str]) -> str:
    """What the present sources, these flags beside our own, the compiler and the CPU build to."""
    key = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        key.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    key.update("\0".join([*FLAGS, *flags, _compiler_version(_compiler()), _cpu_identity()]).encode())
    return f"kernels-{key.hexdigest()[:24]}.so"


def is_whole(content: bytes) -> bool:
    """Whether this is all of a library that was built here, and not cut short or never written out."""
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def compile_to(path: Path, flags: Sequence[str]) -> None:
    """Compile every source in a process of its own, link, and move the result into place in one step."""
    compiler = _compiler()
    deadline = time.monotonic() + BUILD_SECONDS
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
        sources = sorted(SOURCES.glob("*.cpp"), key=lambda source: -source.stat().st_size)
        objects = [str(Path(folder, source.stem + ".o")) for source in sources]
        _run(
            [
                [compiler, *FLAGS, *flags, "-c", str(source), "-o", target]
                for source, target in zip(sources, objects, strict=True)
            ],
            deadline,
        )
        result = Path(folder, "kernels.so")
        _run([[compiler, "-shared", "-pthread", *flags, *objects, "-o", str(result)]], deadline)
        with result.open("r+b") as file:  # a loader reads no further than the library's own end
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        result.chmod(0o755)
        os.replace(result, path)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file; wait for its holder at most as long as a build may take (a dead holder's is free)."""
    deadline = time.monotonic() + BUILD_SECONDS + 30
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NativeUnavailable(
                        f"another process has held {path} for {BUILD_SECONDS + 30:.0f} s; "
                        "stop it or give configure(cache_dir=...) another folder"
                    ) from None
                time.sleep(0.05)
        yield


def _run(commands: list[list[str]], deadline: float) -> None:
    """Run the commands, some at once; the first one that fails or exceeds the deadline ends the others."""
    at_once = max(FEWEST_AT_ONCE, len(os.sched_getaffinity(0)))
    running: deque[tuple[list[str], subprocess.Popen[str]]] = deque()
    try:
        for command in commands:
            if len(running) == at_once:
                _finish(*running[0], deadline)
                running.popleft()
            running.append(
                (
                    command,
                    subprocess.Popen(
                        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
                    ),
                )
            )
        for command, process in running:
            _finish(command, process, deadline)
    finally:
        for _, process in running:
            if process.poll() is None:
                process.kill()
            process.communicate()


def _finish(command: list[str], process: subprocess.Popen[str], deadline: float) -> None:
    try:
        _, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"compiling the native kernels took more than {BUILD_SECONDS:.0f} s") from error
    if process.returncode != 0:
        raise NativeUnavailable(f"the native kernels do not compile here: {' '.join(command)}\n{errors[-4000:]}")


def _compiler() -> str:
    for name in ("g++", "c++"):
        if found := shutil.which(name):
            return found
    raise NativeUnavailable("no C++ compiler (g++ or c++) is on PATH; install one to use the native CPU kernels")


@functools.cache
def _compiler_version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, timeout=30, check=True)
        return done.stdout.decode(errors="replace")
    except (subprocess.SubprocessError, OSError) as error:
        raise NativeUnavailable(f"the C++ compiler {compiler} does not run: {error}") from error


@functools.cache
def _cpu_identity() -> str:
    """Architecture, model and instruction sets of the first CPU."""
    wanted = ("model name", "cpu family", "model", "flags", "Features", "CPU part")
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + "\n".join(line for line in first.splitlines() if line.split("\t")[0].strip() in wanted)
