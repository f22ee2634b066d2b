"""`auto` is the Ray cluster of this user, never the one another user happens to run on the same machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.actors.host import ray_address
from cluster.actors.host.ray_address import own_address
from parallel.errors import ConfigError


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "proc"


def process(proc: Path, pid: int, *arguments: str) -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "cmdline").write_bytes("\0".join(arguments).encode() + b"\0")


def raylet(proc: Path, pid: int, head: str, session: str = "/tmp/ray/session_1") -> None:
    process(proc, pid, "/opt/ray/core/src/ray/raylet/raylet", f"--gcs-address={head}", f"--session_dir={session}")


def everybody_is(monkeypatch: pytest.MonkeyPatch, uid: int) -> None:
    monkeypatch.setattr(ray_address.os, "getuid", lambda: uid)


def test_of_several_clusters_the_one_of_this_user_is_taken(proc: Path) -> None:
    raylet(proc, 10, "10.0.0.1:6379")
    raylet(proc, 11, "10.0.0.1:6379")  # a second node of it on the same machine
    process(proc, 12, "python", "--gcs-address=10.0.0.9:6379")
    assert own_address(proc) == "10.0.0.1:6379"


def test_another_users_cluster_is_refused_with_its_address_and_what_to_do(
    proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raylet(proc, 10, "10.0.0.1:6379")
    everybody_is(monkeypatch, os.getuid() + 1)
    with pytest.raises(ConfigError, match=r"another user's \(10.0.0.1:6379 of .*\); start one of your own"):
        own_address(proc)


def test_of_several_of_this_user_the_last_started_is_taken_or_one_must_be_named(proc: Path, tmp_path: Path) -> None:
    raylet(proc, 10, "10.0.0.1:6379")
    raylet(proc, 11, "10.0.0.2:6379")
    newest = tmp_path / "ray_current_cluster"
    with pytest.raises(ConfigError, match=r"2 Ray clusters of yours run here: 10.0.0.1:6379, 10.0.0.2:6379; name one"):
        own_address(proc, newest)
    newest.write_text("10.0.0.2:6379\n")
    assert own_address(proc, newest) == "10.0.0.2:6379"


def test_what_a_command_started_for_itself_alone_is_not_joined(proc: Path) -> None:
    raylet(proc, 10, "10.0.0.1:6379", "/tmp/tp-decoders-1000/ray/session_2")
    assert own_address(proc) == "auto"


def test_a_named_address_in_the_environment_is_left_to_ray(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raylet(proc, 10, "10.0.0.1:6379")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    assert own_address(proc) == "auto"
