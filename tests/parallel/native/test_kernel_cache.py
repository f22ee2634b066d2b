"""Where built kernels are kept: nothing is loaded that others could have written, and an open folder costs nothing."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from parallel.errors import NativeUnavailable
from parallel.native.compiled import build, kernel_cache, library
from tests.parallel.native.tiny import fresh


@pytest.fixture
def temporary(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in whose place the system's temporary one stands."""
    kernel_cache._say.cache_clear()
    folder = tiny / "tmp"
    folder.mkdir()
    monkeypatch.setattr(kernel_cache.tempfile, "gettempdir", lambda: str(folder))
    return folder


def private(temporary: Path) -> Path:
    return temporary / f"tp-decoders-native-{os.geteuid()}"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_default_cache_is_beside_the_sources_and_ignored_by_git(tiny: Path) -> None:
    folder = kernel_cache.place("kernels.so", None).parent
    assert folder == tiny / "sources" / "_build"
    assert (folder / ".gitignore").read_text() == "*\n"


def test_a_read_only_installation_uses_a_private_folder(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SOURCES", Path("/proc/no-such-folder"))
    assert kernel_cache.place("kernels.so", None).parent == private(temporary)
    assert mode(private(temporary)) == 0o700


def test_a_private_folder_open_to_others_is_refused(temporary: Path) -> None:
    private(temporary).mkdir()
    private(temporary).chmod(0o777)
    with pytest.raises(NativeUnavailable, match="open to this user alone"):
        kernel_cache._private_dir()


def test_a_private_folder_that_is_a_link_is_refused(temporary: Path) -> None:
    private(temporary).symlink_to(temporary)
    with pytest.raises(NativeUnavailable, match="open to this user alone"):
        kernel_cache._private_dir()


@pytest.mark.parametrize("umask", [0o002, 0o000, 0o077])
def test_no_umask_leaves_the_folder_or_the_file_open_to_others(tiny: Path, umask: int) -> None:
    fresh(None)
    before = os.umask(umask)
    try:
        assert library.library().tiny_answer() == 42
    finally:
        os.umask(before)
    beside = tiny / "sources" / "_build"
    for path in (beside, *beside.glob("*.so")):
        assert not mode(path) & 0o022


def test_a_checkout_that_its_group_may_write_to_is_used_once_its_own_folder_is_closed(tiny: Path) -> None:
    beside = tiny / "sources" / "_build"
    beside.mkdir()
    beside.chmod(0o775)
    fresh(None)
    assert library.library().tiny_answer() == 42
    assert mode(beside) == 0o755 and len(list(beside.glob("*.so"))) == 1


@pytest.mark.parametrize("open_to", [0o775, 0o757])
def test_a_configured_folder_that_others_can_write_to_is_left_for_a_private_one_with_one_warning(
    open_to: int, tiny: Path, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny / "cache"
    folder.mkdir()
    folder.chmod(open_to)
    (folder / build.file_name(())).write_bytes(b"planted")
    with caplog.at_level(logging.WARNING):
        assert library.library().tiny_answer() == 42
        fresh(folder)
        assert library.library().tiny_answer() == 42
    assert len(list(private(temporary).glob("*.so"))) == 1
    (said,) = (record.getMessage() for record in caplog.records)
    assert str(folder) in said and "chmod go-w" in said
    assert mode(folder) == open_to, "what somebody else made is left as it is"


def test_a_file_that_others_could_have_written_is_built_again(
    tiny: Path, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = library.prebuild()
    planted = path.read_bytes()
    path.chmod(0o775)
    inode = path.stat().st_ino
    with caplog.at_level(logging.WARNING):
        assert library.library().tiny_answer() == 42
    assert path.stat().st_ino != inode and mode(path) == 0o755 and build.is_whole(planted)
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
@pytest.mark.parametrize("whose", ["file", "folder"])
def test_what_belongs_to_a_stranger_is_not_loaded(whose: str, tiny: Path, temporary: Path) -> None:
    path = library.prebuild()
    stranger = tiny.stat().st_uid + 4242
    os.chown(path if whose == "file" else path.parent, stranger, -1)
    assert library.library().tiny_answer() == 42
    if whose == "file":
        assert path.stat().st_uid == os.geteuid()
    else:
        assert len(list(private(temporary).glob("*.so"))) == 1


def test_a_link_in_the_place_of_the_file_is_not_followed(tiny: Path) -> None:
    path = library.prebuild()
    elsewhere = tiny / "elsewhere.so"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(NativeUnavailable, match="could not be built or loaded"):
        library.library()
