"""The one shared library of the C++ kernels in this process: built on first use, loaded, and whether it is to be used.

Everybody asks here, nobody remembers the answer: it changes when a group's ranks agree to do without (withhold), or
another cache is configured. Which instructions it is compiled for: instruction_set.py. Without a compiler every call
raises NativeUnavailable.
"""

import ctypes
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from parallel.errors import ConfigError, KernelsWithheld, NativeUnavailable
from parallel.native.compiled import build, kernel_cache
from parallel.native.compiled import instruction_set as isa

log = logging.getLogger(__name__)
MAX_THREADS = 256


@dataclass(frozen=True, kw_only=True)
class NativeConfig:
    """Where the library is cached (None: beside the sources, else a private temporary folder), its thread count, and
    flags for compiler and linker beside our own (a sanitiser's).
    """

    cache_dir: Path | None = None
    threads: int = 1
    flags: tuple[str, ...] = ()


class Recorder(Protocol):
    """What is told of the calls that a thread makes, while it records (parallel/replay)."""

    def called(self, entry: "Entry", arguments: tuple[Any, ...]) -> None: ...


class _Recording(threading.local):
    recorder: Recorder | None = None


_recording = _Recording()


def record(recorder: Recorder | None) -> Recorder | None:
    """From now on that recorder is told of this thread's calls, or with None nobody; who was told before."""
    before, _recording.recorder = _recording.recorder, recorder
    return before


def recording() -> bool:
    """Whether somebody is told of this thread's calls."""
    return _recording.recorder is not None


class Entry:
    """A function of the library: called as ctypes calls it, and known to who records."""

    __slots__ = ("address", "argtypes", "function", "name")

    def __init__(self, name: str, argtypes: tuple, function: Callable[..., Any], address: int) -> None:
        self.name, self.argtypes, self.function, self.address = name, argtypes, function, address

    def __call__(self, *arguments: Any) -> Any:
        if (recorder := _recording.recorder) is not None:
            recorder.called(self, arguments)
        return self.function(*arguments)


class _Loaded:
    """What this process knows: its settings, the library once loaded, or why it cannot be had."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.config = NativeConfig()
        self.cdll: ctypes.CDLL | None = None
        self.failure: str | None = None
        self.withheld: str | None = None
        self.instruction_set: str | None = None


_loaded = _Loaded()


def configure(cache_dir: str | Path | None = None, threads: int = 1, flags: Sequence[str] = ()) -> None:
    """Set the cache folder and flags (before the first use) and the thread count; a remembered failure is forgotten."""
    folder = Path(cache_dir) if cache_dir else None
    config = NativeConfig(cache_dir=folder, threads=_checked_threads(threads), flags=tuple(flags))
    with _loaded.lock:
        _loaded.config, _loaded.failure = config, None
        _apply_threads()


def set_threads(threads: int) -> None:
    """The number of threads the kernels of this process use; results do not depend on it."""
    with _loaded.lock:
        _loaded.config = replace(_loaded.config, threads=_checked_threads(threads))
        _apply_threads()


def _apply_threads() -> None:
    if _loaded.cdll is not None:
        _loaded.cdll.pool_set_threads(_loaded.config.threads)


def extra_flags() -> tuple[str, ...]:
    """Those that were configured, for processes that are to run the same library."""
    return _loaded.config.flags


def cache_dir() -> Path | None:
    """The folder that was configured."""
    return _loaded.config.cache_dir


def withhold(reason: str | None) -> None:
    """From now on this process does without the kernels, for that reason; None: it need not any more. The ranks of a
    group agree on it (parallel.ranks.machine_check), so that none computes what another cannot.
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


def instruction_set() -> str:
    """The name (instruction_set.NAMES) that the loaded library was compiled for, else the one that it would be."""
    return _loaded.instruction_set or isa.chosen()


def in_use() -> str:
    """What computes here: the instruction set and the order of bfloat16 sums, as in "avx512 amx32"; empty while the
    library is not loaded, or withheld."""
    if _loaded.cdll is None or _loaded.withheld is not None:
        return ""
    return f"{_loaded.instruction_set} {isa.BFLOAT16_ORDER}"


def prebuild() -> Path:
    """Compiles the configured library where it is not there yet, and loads nothing."""
    path = _path(_loaded.config)
    with build.exclusive(path.with_suffix(".lock")):
        if not path.exists():
            build.compile_to(path, _flags(_loaded.config))
    return path


def entry(name: str, argtypes: tuple, restype: type | None = None, keep_lock: bool = False) -> Entry:
    """A function of the library. keep_lock: the interpreter lock is held during the call, right for calls of a few
    microseconds, which otherwise queue behind another Python thread to get it back."""
    loader = ctypes.PyDLL if keep_lock else ctypes.CDLL
    function = loader(None, handle=library()._handle)[name]
    function.argtypes, function.restype = argtypes, restype
    return Entry(name, argtypes, function, ctypes.cast(function, ctypes.c_void_p).value or 0)


def available() -> bool:
    """Whether library() works here: the one answer that everybody in this process goes by."""
    if _loaded.cdll is not None:
        return _loaded.withheld is None
    try:
        library()
    except NativeUnavailable:
        return False
    return True


def _checked_threads(threads: int) -> int:
    if not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
        raise ConfigError(f"threads is {threads!r}; the native kernels take a whole number of 1 to {MAX_THREADS}")
    return threads


def _load(config: NativeConfig) -> ctypes.CDLL:
    try:
        cdll = _built(config)
    except OSError as error:
        raise NativeUnavailable(
            f"the native kernels could not be built or loaded: {error}; "
            "give configure(cache_dir=...) a folder that allows writing and loading code"
        ) from error
    cdll.pool_set_threads(config.threads)
    _loaded.instruction_set = _with_tiles(cdll, isa.chosen())
    log.info("native kernels for %s, bfloat16 sums in the order %s", _loaded.instruction_set, isa.BFLOAT16_ORDER)
    return cdll


def _with_tiles(cdll: ctypes.CDLL, name: str) -> str:
    """The name that counts once tiles are switched on, where they are meant to be and a product of theirs is right."""
    if name not in isa.TILED:
        return name
    reason = ctypes.create_string_buffer(256)
    if cdll.tiles_enable(reason, ctypes.c_int64(len(reason))):
        return name
    why, plain = reason.value.decode(), isa.TILED[name]
    if isa.forced() or plain is None:
        raise ConfigError(f"{isa.VARIABLE} is {name!r}, which this machine cannot run: {why}; unset it or name another")
    log.warning("this CPU has AMX, but it is not used: %s; the kernels are those for %s", why, plain)
    return plain


def _built(config: NativeConfig) -> ctypes.CDLL:
    """The cached file, needing no write access; built first where it is missing, damaged or not to be trusted."""
    path = _path(config)
    if (cdll := _opened(path)) is not None:
        return cdll
    with build.exclusive(path.with_suffix(".lock")):
        if (cdll := _opened(path)) is None:  # nobody built it in the meantime
            build.compile_to(path, _flags(config))
    cdll = cdll or _opened(path)
    if cdll is None:
        raise NativeUnavailable(
            f"{path} was built and cannot be read back whole; give configure(cache_dir=...) a folder on a sound disk"
        )
    return cdll


def _opened(path: Path) -> ctypes.CDLL | None:
    content = kernel_cache.contents(path)
    if content is None or not build.is_whole(content):
        return None
    return ctypes.CDLL(str(path))


def _path(config: NativeConfig) -> Path:
    return kernel_cache.place(build.file_name(_flags(config)), config.cache_dir)


def _flags(config: NativeConfig) -> tuple[str, ...]:
    return (*isa.flags(isa.chosen()), *config.flags)
