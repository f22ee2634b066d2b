"""Builds the C++ sources of this folder into one shared library on first use, and loads it.

The file is cached under a name that hashes the sources, the flags, the compiler and the CPU's model and flags: a cache
shared by unlike machines never hands one of them foreign code, and a changed source is a new file. It is loaded only
where nobody else could have written it, and ends with its own digest, so that a damaged one is built again. Several
processes starting at once compile once. No environment variable is read; without a compiler every call raises
NativeUnavailable.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError, KernelsWithheld, NativeUnavailable

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
DIGEST_BYTES = hashlib.sha256().digest_size
MAX_THREADS = 256


@dataclass(frozen=True, kw_only=True)
class NativeConfig:
    """Where the library is cached (None: beside the sources, else a private temporary folder), its thread count, and
    flags for compiler and linker beside our own (a sanitiser's).
    """

    cache_dir: Path | None = None
    threads: int = 1
    flags: tuple[str, ...] = ()


log = logging.getLogger(__name__)


class _Loaded:
    """What this process knows: its settings, the library once loaded, or why it cannot be had."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.config = NativeConfig()
        self.cdll: ctypes.CDLL | None = None
        self.failure: str | None = None
        self.withheld: str | None = None


_loaded = _Loaded()


def configure(cache_dir: str | Path | None = None, threads: int = 1, flags: Sequence[str] = ()) -> None:
    """Set the cache folder and flags (before the first use) and the thread count; a remembered failure is forgotten."""
    cache = Path(cache_dir) if cache_dir else None
    _configure(NativeConfig(cache_dir=cache, threads=_checked_threads(threads), flags=tuple(flags)))


def _configure(config: NativeConfig) -> None:
    with _loaded.lock:
        _loaded.config = config
        _loaded.failure = None
        if _loaded.cdll is not None:
            _loaded.cdll.pool_set_threads(config.threads)


def set_threads(threads: int) -> None:
    """The number of threads the kernels of this process use; results do not depend on it."""
    _configure(replace(_loaded.config, threads=_checked_threads(threads)))


def extra_flags() -> tuple[str, ...]:
    """Those that were configured, for processes that are to run the same library."""
    return _loaded.config.flags


def cache_dir() -> Path | None:
    """The folder that was configured."""
    return _loaded.config.cache_dir


def withhold(reason: str | None) -> None:
    """From now on this process does without the kernels, for that reason; None: it need not any more. The ranks of a
    group agree on it (parallel.machines), so that none computes what another cannot.
    """
    _loaded.withheld = reason


def library() -> ctypes.CDLL:
    """The loaded library, built first if need be; raises NativeUnavailable, at once after the first failure."""
    if _loaded.withheld is not None:
        raise KernelsWithheld(_loaded.withheld)
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


def build() -> Path:
    """Compiles the configured library where it is not there yet, and loads nothing."""
    path = library_path(_loaded.config.cache_dir or _default_cache_dir())
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with _exclusive(path.with_suffix(".lock")):
        if not path.exists():
            _build(path)
    return path


def entry(name: str, argtypes: tuple, restype: type | None = None, keep_lock: bool = False) -> Callable[..., Any]:
    """A function of the library. keep_lock: the interpreter lock is held during the call, right for calls of a few
    microseconds, which otherwise queue behind another Python thread to get it back."""
    loader = ctypes.PyDLL if keep_lock else ctypes.CDLL
    function = loader(None, handle=library()._handle)[name]
    function.argtypes, function.restype = argtypes, restype
    return function


def available() -> bool:
    """Whether library() works here: the one answer that everybody in this process goes by."""
    if _loaded.cdll is not None:
        return _loaded.withheld is None
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
    key.update("\0".join([*FLAGS, *_loaded.config.flags, _compiler_version(_compiler()), _cpu_identity()]).encode())
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
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _check_owner(path.parent, path.parent.stat())
    with _exclusive(path.with_suffix(".lock")):
        if (cdll := _opened(path)) is None:  # nobody built it in the meantime
            _build(path)
    cdll = cdll or _opened(path)
    if cdll is None:
        raise NativeUnavailable(
            f"{path} was built and cannot be read back whole; give configure(cache_dir=...) a folder on a sound disk"
        )
    return cdll


def _opened(path: Path) -> ctypes.CDLL | None:
    """The library, where the file is there and whole; an error where somebody else may have written it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        _check_owner(path, os.fstat(descriptor))
        _check_owner(path.parent, path.parent.stat())
        content = file.read()
    if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        return None  # cut short, or never written out before the machine stopped
    return ctypes.CDLL(str(path))


def _check_owner(path: Path, status: os.stat_result) -> None:
    """Refuses what a user could have put there who cannot change our sources either."""
    trusted = {0, os.geteuid(), SOURCES.stat().st_uid if SOURCES.exists() else 0}
    sticky_folder = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    if status.st_uid not in trusted or (status.st_mode & 0o022 and not sticky_folder):
        raise NativeUnavailable(
            f"{path} (user {status.st_uid}, mode {status.st_mode & 0o7777:o}) can be written by others, so no kernels "
            "are loaded from it; run chmod go-w on it, or give configure(cache_dir=...) a folder of this user's own"
        )


def _build(path: Path) -> None:
    """Compile every source in a process of its own, link, and move the result into place in one step."""
    compiler, flags = _compiler(), _loaded.config.flags
    deadline = time.monotonic() + BUILD_SECONDS
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
        sources = sorted(SOURCES.glob("*.cpp"))
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


def _run(commands: list[list[str]], deadline: float) -> None:
    """Run all commands at once; the first one that fails or exceeds the deadline ends the others."""
    running = [
        subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        for c in commands
    ]
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


def _default_cache_dir() -> Path:
    beside = SOURCES / "_build"
    if library_path(beside).exists():
        return beside if _nobody_elses(beside) else _private_dir()
    try:
        beside.mkdir(mode=0o755, exist_ok=True)
        if not _nobody_elses(beside):
            return _private_dir()
        if os.access(beside, os.W_OK | os.X_OK):
            ignore = beside / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n")
            return beside
    except OSError:  # an installed package in a read-only tree
        return _private_dir()
    return _private_dir()


def _nobody_elses(beside: Path) -> bool:
    """Whether others cannot write to the folder beside the sources; one of this user's that was left open is closed."""
    status = beside.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o022:
        beside.chmod(0o755)
    try:
        _check_owner(beside, beside.stat())
    except NativeUnavailable as error:
        log.warning("%s", error)
        return False
    return True


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
