"""The watch over the processes of a cluster of one's own, with processes that are nothing but that."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
import ray

from cluster.actors.host.ray_head import RayHead, bare


class Watched(RayHead):
    """Over a raylet and a GCS that sleep."""

    def watch(self) -> None:
        self._processes = [
            (name, subprocess.Popen(["sleep", "300"], start_new_session=True))
            for name in ("gcs_server", "log_monitor", "raylet")
        ]
        super().watch()

    def process(self, name: str) -> subprocess.Popen[bytes]:
        return dict(self._processes)[name]


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    head = Watched()

    class Node:
        @staticmethod
        def live_processes() -> object:
            return head._processes

    monkeypatch.setattr("ray._private.worker._global_node", Node)
    head.watch()
    yield head
    head.close()
    head.end()


def until_lost(head: Watched) -> str:
    end = time.monotonic() + 60
    while not head.lost:
        assert time.monotonic() < end
        time.sleep(0.01)
    return head.lost


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_the_end_of_a_vital_process_is_told_once_with_its_signal(head: Watched, name: str) -> None:
    told: list[str] = []
    head.observe(told.append)
    os.kill(head.process("log_monitor").pid, signal.SIGKILL)  # nobody needs that one to serve
    os.kill(head.process(name).pid, signal.SIGKILL)
    words = f"Ray's {name} on this machine ended (by SIGKILL)"
    assert until_lost(head) == words
    late: list[str] = []
    head.observe(late.append)
    assert told == late == [words]


def test_a_cluster_that_is_lost_is_not_asked_to_leave_and_what_is_left_of_it_is_ended(head: Watched) -> None:
    head.process("raylet").terminate()
    assert "by SIGTERM" in until_lost(head)
    asked: list[str] = []
    assert not head.left(lambda: asked.append("shutdown")) and not asked
    head.end()
    assert all(process.poll() is not None for _, process in head._processes)


def test_leaving_does_not_wait_for_a_cluster_that_is_lost_meanwhile(head: Watched) -> None:
    def leave() -> None:
        head.process("gcs_server").kill()
        time.sleep(300)

    began = time.monotonic()
    assert not head.left(leave)
    assert time.monotonic() - began < 100 and "gcs_server" in head.lost


def test_a_cluster_that_is_left_in_order_loses_nothing(head: Watched) -> None:
    assert head.left(head.close)
    head.process("raylet").kill()
    time.sleep(0.5)
    assert not head.lost


def test_leaving_is_not_waited_for_when_it_takes_too_long(head: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.actors.host.ray_head.LEAVE_S", 0.5)
    assert not head.left(lambda: time.sleep(300))
    assert head.lost == "Ray did not end within 0.5 s"


def test_a_ray_that_has_other_names_starts_all_that_it_starts_by_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = ray._private.node.Node
    before = node.start_monitor
    with bare():
        assert node.start_monitor is not before
    assert node.start_monitor is before
    monkeypatch.delattr(node, "start_api_server")
    with bare():
        assert node.start_monitor is before
    assert "it starts two processes more" in caplog.text
