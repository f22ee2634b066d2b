"""The builder of the native library: cache, races, failures; from one tiny source."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.errors import ConfigError, NativeUnavailable
from parallel.native import library as native

TINY = """
static int threads = 1;
extern "C" void pool_set_threads(int n) { threads = n; }
extern "C" int pool_num_threads() { return threads; }
extern "C" int tiny_answer() { return 42; }
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of sources and an empty cache; the process's own library is put back afterwards."""
    if native.shutil.which("g++") is None:
        pytest.skip("no g++ here")
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "tiny.cpp").write_text(TINY)
    monkeypatch.setattr(native, "SOURCES", sources)
    monkeypatch.setattr(native, "_loaded", native._Loaded())
    native.configure(cache_dir=tmp_path / "cache")
    yield tmp_path


def fresh(cache: Path, threads: int = 1) -> None:
    """Forget the loaded library, as a new process would."""
    native._loaded = native._Loaded()
    native.configure(cache_dir=cache, threads=threads)


def counting_compiler(folder: Path) -> Path:
    """A compiler that writes a line for every call."""
    script = folder / "compiler"
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\nexec g++ "$@"\n')
    script.chmod(0o755)
    return script


def calls(folder: Path) -> list[str]:
    log = folder / "calls"
    return [line for line in log.read_text().splitlines() if line != "--version"] if log.exists() else []


def test_the_library_is_built_once_and_then_found_in_the_cache(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_compiler", lambda: str(counting_compiler(tiny)))
    assert native.library().tiny_answer() == 42
    assert native.library() is native.library()
    built = len(calls(tiny))
    assert built == 2, "one compilation and one link"
    fresh(tiny / "cache", threads=3)
    assert native.library().tiny_answer() == 42
    assert native.library().pool_num_threads() == 3
    assert len(calls(tiny)) == built
    assert [p.suffix for p in sorted((tiny / "cache").iterdir())] == [".lock", ".so"], "no build folder is left"


def test_a_changed_source_compiler_or_cpu_is_another_file(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {native.library_path(tiny)}
    (tiny / "sources" / "tiny.h").write_text("// a header\n")
    paths.add(native.library_path(tiny))
    monkeypatch.setattr(native, "_cpu_identity", lambda: "another CPU")
    paths.add(native.library_path(tiny))
    monkeypatch.setattr(native, "_compiler_version", lambda compiler: "another compiler")
    paths.add(native.library_path(tiny))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    paths.add(native.library_path(tiny))
    assert len(paths) == 5


def test_processes_that_start_at_once_compile_once(tiny: Path) -> None:
    program = f"""
from pathlib import Path
from parallel.native import library as native
native.SOURCES = Path({str(tiny / "sources")!r})
native._compiler = lambda: {str(counting_compiler(tiny))!r}
native.configure(cache_dir={str(tiny / "cache")!r})
assert native.library().tiny_answer() == 42
"""
    root = str(Path(__file__).parents[3])
    ranks = [subprocess.Popen([sys.executable, "-c", program], cwd=root) for _ in range(4)]
    assert [rank.wait(timeout=250) for rank in ranks] == [0, 0, 0, 0]
    assert len(calls(tiny)) == 2


def test_a_compile_error_is_reported_in_the_compilers_words_and_remembered(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_compiler", lambda: str(counting_compiler(tiny)))
    (tiny / "sources" / "broken.cpp").write_text("int f() { return no_such_name; }\n")
    with pytest.raises(NativeUnavailable, match="no_such_name"):
        native.library()
    tried = len(calls(tiny))
    with pytest.raises(NativeUnavailable, match="no_such_name"):
        native.library()
    assert not native.available()
    assert len(calls(tiny)) == tried
    assert not list((tiny / "cache").glob("*.so"))


def test_without_a_compiler_the_error_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler"):
        native.library()


def test_a_library_that_is_there_needs_no_write_access(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = tiny / "sources" / "_build"
    fresh(beside)
    native.library()
    native._loaded = native._Loaded()
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("a folder was made"))
    monkeypatch.setattr(native, "_exclusive", lambda path: pytest.fail("a lock was taken"))
    assert native.library().tiny_answer() == 42
    assert native._default_cache_dir() == beside


def test_a_damaged_cached_file_is_built_again(tiny: Path) -> None:
    path = native.library_path(tiny / "cache")
    path.parent.mkdir()
    path.write_bytes(b"not a library")
    assert native.library().tiny_answer() == 42


def test_a_lock_that_is_never_released_ends_in_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "BUILD_SECONDS", -29.8)
    lock = native.library_path(tiny / "cache").with_suffix(".lock")
    lock.parent.mkdir()
    with native._exclusive(lock), pytest.raises(NativeUnavailable, match="another process has held"):
        native.library()


def test_the_default_cache_is_beside_the_sources_and_ignored_by_git(tiny: Path) -> None:
    fresh_cache = native._default_cache_dir()
    assert fresh_cache == tiny / "sources" / "_build"
    assert (fresh_cache / ".gitignore").read_text() == "*\n"


def test_a_read_only_installation_uses_a_private_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tiny))
    monkeypatch.setattr(native, "SOURCES", Path("/proc/no-such-folder"))
    private = native._default_cache_dir()
    assert private == tiny / f"tp-decoders-native-{os.getuid()}"
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_private_folder_open_to_others_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tiny))
    planted = tiny / f"tp-decoders-native-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    with pytest.raises(NativeUnavailable, match="open to this user alone"):
        native._private_dir()


@pytest.mark.parametrize("threads", [0, -1, 1.5, 10_000])
def test_a_thread_count_out_of_range_is_refused(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded", native._Loaded())
    with pytest.raises(ConfigError, match="threads is"):
        native.set_threads(threads)
