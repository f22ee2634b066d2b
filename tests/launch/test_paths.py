"""Paths of settings: the user's folder, links, links in a circle."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.paths import full_path


def test_a_tilde_is_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert full_path("~/run") == tmp_path / "run"


def test_links_are_followed_and_a_circle_is_left_to_the_reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("link").symlink_to("there")
    Path("circle").symlink_to("circle")
    assert full_path("link/x") == tmp_path / "there" / "x"
    assert full_path("circle") == tmp_path / "circle"
