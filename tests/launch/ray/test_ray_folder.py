"""Ray's files lie in a folder of this user's alone, whose sockets have room, and what killed runs left goes."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest

from launch.ray import ray_folder as module
from launch.ray.ray_folder import SESSIONS_KEPT, ray_folder, sweep
from parallel.errors import ConfigError

NAME = f"tp-decoders-{os.getuid()}"
NOBODY = 2**22 + 1
"""A process that cannot be: above the largest number Linux gives."""


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in module.VARIABLES:
        monkeypatch.delenv(name, raising=False)


def short(tmp_path: Path, name: str) -> Path:
    """A short way to a folder of the test's: pytest's own are too long for a socket."""
    link = Path("/tmp") / f"{name}{os.getpid()}"
    link.symlink_to(tmp_path)
    return link


def test_the_folder_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = short(tmp_path, "a")
    try:
        monkeypatch.setenv("TMPDIR", str(base))
        folder = ray_folder()
        assert folder == base / NAME and stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.chmod(0o777)
        assert stat.S_IMODE(ray_folder().stat().st_mode) == 0o700
    finally:
        base.unlink()


@pytest.mark.parametrize("variable", module.VARIABLES)
def test_a_folder_that_is_too_long_is_passed_over_and_named(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    long = tmp_path / ("job" * 20)
    long.mkdir()
    monkeypatch.setenv(variable, str(long))
    with caplog.at_level(logging.WARNING):
        assert ray_folder() != long / NAME
    assert f"{variable} {long}: its path is too long" in caplog.text


def test_a_link_in_the_folders_place_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = short(tmp_path, "b")
    try:
        (tmp_path / "elsewhere").mkdir()
        (base / NAME).symlink_to(tmp_path / "elsewhere")
        monkeypatch.setenv("TMPDIR", str(base))
        assert ray_folder() != base / NAME
    finally:
        base.unlink()


def test_where_nothing_will_do_all_reasons_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_candidates", lambda: [("RAY_TMPDIR", "/nowhere"), ("folder", "/tmp/" + "x" * 100)])
    with pytest.raises(ConfigError, match="RAY_TMPDIR /nowhere: No such file.*too long.*set RAY_TMPDIR to a folder"):
        ray_folder()


def test_what_killed_runs_left_goes_and_what_runs_stays(tmp_path: Path) -> None:
    left, mine = tmp_path / f"token-{NOBODY}-abc", tmp_path / f"token-{os.getpid()}-abc"
    old = [tmp_path / "ray" / f"session_2026-01-{day:02d}_00-00-00_000000_{NOBODY}" for day in range(1, 13)]
    running = tmp_path / "ray" / f"session_2025-01-01_00-00-00_000000_{os.getpid()}"
    for folder in (left, mine, *old, running):
        folder.mkdir(parents=True)
    sweep(tmp_path)
    assert mine.exists() and running.exists() and not left.exists()
    assert [folder.exists() for folder in old] == [False] * (12 - SESSIONS_KEPT) + [True] * SESSIONS_KEPT
