"""Folders of one user: what others could have prepared for us is refused, what is ours is closed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.private_folder import no_file_for_everybody, own_folder

STRANGER = 65_534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving files to another user takes root")


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_for_this_user_alone_also_where_files_are_open_by_default(tmp_path: Path, umask: None) -> None:
    own_folder(tmp_path / "mine")
    assert mode(tmp_path / "mine") == 0o700


def test_one_that_was_left_open_is_closed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(0o777)
    own_folder(tmp_path / "mine")
    assert mode(tmp_path / "mine") == 0o700


def test_a_link_of_ones_own_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "mine").symlink_to(tmp_path / "disk")
    own_folder(tmp_path / "mine")
    assert mode(tmp_path / "disk") == 0o700


@needs_root
@pytest.mark.parametrize("below", [".", "deeper"])
def test_a_link_of_anothers_is_not(below: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "mine").symlink_to(tmp_path / "disk")
    os.lchown(tmp_path / "mine", STRANGER, STRANGER)
    with pytest.raises(PermissionError, match=f"is a link that user {STRANGER} made"):
        own_folder(tmp_path / "mine" / below)


@needs_root
def test_a_folder_of_anothers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    os.chown(tmp_path / "mine", STRANGER, STRANGER)
    with pytest.raises(PermissionError, match=f"belongs to user {STRANGER}"):
        own_folder(tmp_path / "mine")


@pytest.mark.parametrize("below", ["mine", "deeper/mine"])
def test_a_place_where_others_may_put_something_else_is_refused(below: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="others may put another folder in its place"):
        own_folder(tmp_path / below)
    tmp_path.chmod(0o1777)
    own_folder(tmp_path / below)


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(NotADirectoryError):
        own_folder(tmp_path / "mine")


@pytest.mark.parametrize(("given", "then"), [(0o000, 0o775), (0o002, 0o775), (0o022, 0o755), (0o077, 0o700)])
def test_no_file_is_everybodys_and_the_rest_is_as_the_user_has_it(
    given: int, then: int, tmp_path: Path, umask: None
) -> None:
    os.umask(given)
    no_file_for_everybody()
    (tmp_path / "state").mkdir()
    assert mode(tmp_path / "state") == then
