"""The builder of the native library: cache, races, failures; from one tiny source."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parallel.attention.selector import choose_backend
from parallel.errors import ConfigError, NativeUnavailable
from parallel.matmul.activation import is_native
from parallel.matmul.products import uses_native
from parallel.native.compiled import build
from parallel.native.compiled import library as native
from tests.parallel.native.tiny import fresh


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
    monkeypatch.setattr(build, "_compiler", lambda: str(counting_compiler(tiny)))
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
    paths = {build.file_name(())}
    (tiny / "sources" / "tiny.h").write_text("// a header\n")
    paths.add(build.file_name(()))
    monkeypatch.setattr(build, "_cpu_identity", lambda: "another CPU")
    paths.add(build.file_name(()))
    monkeypatch.setattr(build, "_compiler_version", lambda compiler: "another compiler")
    paths.add(build.file_name(()))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    paths.add(build.file_name(()))
    assert len(paths) == 5


def test_processes_that_start_at_once_compile_once(tiny: Path) -> None:
    program = f"""
from pathlib import Path
from parallel.native.compiled import build
from parallel.native.compiled import library as native
build.SOURCES = Path({str(tiny / "sources")!r})
build._compiler = lambda: {str(counting_compiler(tiny))!r}
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
    monkeypatch.setattr(build, "_compiler", lambda: str(counting_compiler(tiny)))
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
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler"):
        native.library()


def test_a_library_that_is_there_needs_no_write_access(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = tiny / "sources" / "_build"
    fresh(beside)
    native.library()
    native._loaded = native._Loaded()
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("a folder was made"))
    monkeypatch.setattr(build, "exclusive", lambda path: pytest.fail("a lock was taken"))
    assert native.library().tiny_answer() == 42


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [cut, flipped, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"not a library")]
)
def test_a_damaged_cached_file_is_built_again(tiny: Path, damage: Callable[[Path], object]) -> None:
    path = native.prebuild()
    whole = path.read_bytes()
    path.write_bytes(whole)  # in the place of one that may be mapped
    damage(path)
    assert native.library().tiny_answer() == 42
    assert build.is_whole(path.read_bytes())


def test_the_one_answer_whether_there_are_kernels_follows_the_settings(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers() -> set[bool]:
        x = torch.zeros(2, 8)
        best = choose_backend(None, "cpu", x.dtype, alibi=False, head_dim=8).name
        return {native.available(), uses_native(x), is_native(x, "gelu"), best == "cpu"}

    (tiny / "file").write_text("no folder can be below")
    native.configure(cache_dir=tiny / "file" / "cache")
    assert answers() == {False} == answers()
    native.set_threads(2)  # changes nothing of what was found
    monkeypatch.setattr(build, "compile_to", lambda *_: pytest.fail("tried again"))
    assert answers() == {False}
    monkeypatch.undo()
    monkeypatch.setattr(build, "SOURCES", tiny / "sources")
    monkeypatch.setattr(native, "_loaded", native._Loaded())
    native.configure(cache_dir=tiny / "cache")
    assert answers() == {True}
    native.withhold("another rank has none")
    assert answers() == {False}
    native.set_threads(1)
    assert answers() == {False}
    native.withhold(None)
    assert answers() == {True}


def test_a_lock_that_is_never_released_ends_in_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BUILD_SECONDS", -29.8)
    lock = native._path(native._loaded.config).with_suffix(".lock")
    lock.parent.mkdir(exist_ok=True)
    with build.exclusive(lock), pytest.raises(NativeUnavailable, match="another process has held"):
        native.library()


@pytest.mark.parametrize("threads", [0, -1, 1.5, 10_000])
def test_a_thread_count_out_of_range_is_refused(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded", native._Loaded())
    with pytest.raises(ConfigError, match="threads is"):
        native.set_threads(threads)
