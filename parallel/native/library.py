"""Builds the C++ sources of this folder into one shared library on first use, and loads it.

The file is cached under a name that hashes the sources, the flags, the compiler and the CPU's model and flags: a cache
shared by unlike machines never hands one of them foreign code, and a changed source is a new file. Several processes
starting at once compile once. No environment variable is read; without a compiler every call raises NativeUnavailable.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError, NativeUnavailable

SOURCES = Path(__file__).parent
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
BUILD_SECONDS = 300.0
MAX_THREADS = 256


@dataclass(frozen=True, kw_only=True)
class NativeConfig:
    """Where the library is cached (None: beside the sources, else a private temporary folder) and its thread count."""

    cache_dir: Path | None = None
    threads: int = 1


class _Loaded:
    """What this process knows: its settings, the library once loaded, or why it cannot be had."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.config = NativeConfig()
        self.cdll: ctypes.CDLL | None = None
        self.failure: str | None = None


_loaded = _Loaded()


def configure(cache_dir: str | Path | None = None, threads: int = 1) -> None:
    """Set the cache folder (before the first use) and the thread count; a remembered failure is forgotten."""
    config = NativeConfig(cache_dir=Path(cache_dir) if cache_dir else None, threads=_checked_threads(threads))
    with _loaded.lock:
        _loaded.config = config
        _loaded.failure = None
        if _loaded.cdll is not None:
            _loaded.cdll.pool_set_threads(threads)


def set_threads(threads: int) -> None:
    """The number of threads the kernels of this process use; results do not depend on it."""
    configure(_loaded.config.cache_dir, threads)


def library() -> ctypes.CDLL:
    """The loaded library, built first if need be; raises NativeUnavailable, at once after the first failure."""
    if _loaded.cdll is not None:
        return _loaded.cdll
    with _loaded.lock:
        if _loaded.failure is not None:
            raise NativeUnavailable(_loaded.failure)
        if _loaded.cdll is None:
            try:
                _loaded.cdll = _load(_loaded.config)
            except NativeUnavailable as error:
                _loaded.failure = str(error)
                raise
        return _loaded.cdll


def entry(name: str, argtypes: tuple, restype: type | None = None, keep_lock: bool = False) -> Callable[..., Any]:
    """A function of the library. keep_lock: the interpreter lock is held during the call, right for calls of a few
    microseconds, which otherwise queue behind another Python thread to get it back."""
    loader = ctypes.PyDLL if keep_lock else ctypes.CDLL
    function = loader(None, handle=library()._handle)[name]
    function.argtypes, function.restype = argtypes, restype
    return function


def available() -> bool:
    """Whether library() works here."""
    try:
        library()
    except NativeUnavailable:
        return False
    return True


def library_path(cache_dir: Path) -> Path:
    """The file that the present sources, flags, compiler and CPU build to."""
    key = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        key.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    key.update("\0".join([*FLAGS, _compiler_version(_compiler()), _cpu_identity()]).encode())
    return cache_dir / f"kernels-{key.hexdigest()[:24]}.so"


def _checked_threads(threads: int) -> int:
    if not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
        raise ConfigError(f"threads is {threads!r}; the native kernels take a whole number of 1 to {MAX_THREADS}")
    return threads


def _load(config: NativeConfig) -> ctypes.CDLL:
    try:
        cdll = _built(library_path(config.cache_dir or _default_cache_dir()))
    except OSError as error:
        raise NativeUnavailable(
            f"the native kernels could not be built or loaded: {error}; "
            "give configure(cache_dir=...) a folder that allows writing and loading code"
        ) from error
    cdll.pool_set_threads(config.threads)
    return cdll


def _built(path: Path) -> ctypes.CDLL:
    """The cached file, needing no write access; built first where it is missing or damaged."""
    if (cdll := _opened(path)) is not None:
        return cdll
    path.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(path.with_suffix(".lock")):
        if (cdll := _opened(path)) is None:  # nobody built it in the meantime
            _build(path)
    return cdll or ctypes.CDLL(str(path))


def _opened(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # missing, cut short or otherwise not a library
        return None


def _build(path: Path) -> None:
    """Compile every source in a process of its own, link, and move the result into place in one step."""
    compiler = _compiler()
    deadline = time.monotonic() + BUILD_SECONDS
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [str(Path(folder, source.stem + ".o")) for source in sources]
        _run(
            [
                [compiler, *FLAGS, "-c", str(source), "-o", target]
                for source, target in zip(sources, objects, strict=True)
            ],
            deadline,
        )
        result = Path(folder, "kernels.so")
        _run([[compiler, "-shared", "-pthread", *objects, "-o", str(result)]], deadline)
        os.replace(result, path)


def _run(commands: list[list[str]], deadline: float) -> None:
    """Run all commands at once; the first one that fails or exceeds the deadline ends the others."""
    running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        for command, process in zip(commands, running, strict=True):
            _, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            if process.returncode != 0:
                raise NativeUnavailable(
                    f"the native kernels do not compile here: {' '.join(command)}\n{errors[-4000:]}"
                )
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"compiling the native kernels took more than {BUILD_SECONDS:.0f} s") from error
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.communicate()


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file; wait for its holder at most as long as a build may take (a dead holder's is free)."""
    deadline = time.monotonic() + BUILD_SECONDS + 30
    with path.open("w") as lock:
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


def _default_cache_dir() -> Path:
    beside = SOURCES / "_build"
    if library_path(beside).exists():
        return beside
    try:
        beside.mkdir(exist_ok=True)
        if os.access(beside, os.W_OK | os.X_OK):
            ignore = beside / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n")
            return beside
    except OSError:  # an installed package in a read-only tree
        return _private_dir()
    return _private_dir()


def _private_dir() -> Path:
    """A folder only this user can write, so that nobody else can plant code in it."""
    path = Path(tempfile.gettempdir(), f"tp-decoders-native-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise NativeUnavailable(
            f"{path} is not a folder owned by and open to this user alone; "
            "remove it or give configure(cache_dir=...) another folder"
        )
    return path


def _compiler() -> str:
    for name in ("g++", "c++"):
        if found := shutil.which(name):
            return found
    raise NativeUnavailable("no C++ compiler (g++ or c++) is on PATH; install one to use the native CPU kernels")


@functools.cache
def _compiler_version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
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
