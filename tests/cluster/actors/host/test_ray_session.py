"""Joining a cluster that is not there, and asking for what cannot be."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
import ray

from cluster.actors.host import ray_session as session
from cluster.actors.host.ray_session import check_reachable, ray_session
from parallel.errors import ConfigError, WorkerError


def test_an_address_where_nobody_listens_is_said_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(WorkerError, match=f"no Ray cluster answers at 127.0.0.1:{port}"):
        check_reachable(f"127.0.0.1:{port}")
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("address", ["", "head", "ray://head:10001", ":6379", "head:port"])
def test_an_address_that_is_none_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(ConfigError, match="write auto, or HOST:PORT"):
        check_reachable(address)


def test_cores_are_for_a_local_cluster_only() -> None:
    with pytest.raises(ConfigError, match="num_cpus=2 is for a local cluster"), ray_session("auto", num_cpus=2):
        pass


def test_a_local_cluster_has_at_least_one_core() -> None:
    with pytest.raises(ConfigError, match="num_cpus is 0"), ray_session(num_cpus=0):
        pass


SLOW = (
    Exception("The current node timed out during startup. This could happen because some of the raylet failed"),
    RuntimeError("Timed out waiting for file /tmp/ray/session_x/gcs_server_port_y"),
)


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize("failures", [0, session.STARTS - 1, session.STARTS])
def test_a_start_that_ray_gave_up_is_tried_again_and_fails_in_one_line(
    monkeypatch: pytest.MonkeyPatch, failures: int, slow: Exception
) -> None:
    tried = []

    def init(**options: Any) -> None:
        tried.append(options["address"])
        if len(tried) <= failures:
            raise slow

    monkeypatch.setattr(session.ray, "init", init)
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    if failures < session.STARTS:
        with ray_session(num_cpus=1):
            assert tried == ["local"] * (failures + 1)
    else:
        with pytest.raises(WorkerError, match="could not start a local Ray cluster: .*[Tt]imed out"):
            ray_session(num_cpus=1).__enter__()


def test_another_error_of_ray_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def init(**options: Any) -> None:
        tried.append(options)
        raise ConnectionError("no route")

    monkeypatch.setattr(session.ray, "init", init)
    with pytest.raises(WorkerError, match="no route"):
        ray_session(num_cpus=1).__enter__()
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("listens", "given", "alone"),
    [
        (None, None, True),
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "localhost", True),
        ("0.0.0.0", "127.0.0.1", False),
    ],
)
def test_a_cluster_of_this_machine_alone_is_started_and_joined_on_loopback(
    listens: str | None, given: str | None, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[str] = []
    monkeypatch.setattr(session, "_init", lambda *_: where.append(ray.util.get_node_ip_address()))
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)  # the tests' own cluster may be up, and stays
    monkeypatch.setattr("ray._private.worker._global_node", None)
    monkeypatch.setattr("ray._private.services.node_ip_address_from_perspective", lambda _: "127.0.0.2")
    with socket.create_server((listens or "127.0.0.1", 0)) as head:
        with session.ray_session(None if given is None else f"{given}:{head.getsockname()[1]}"):
            pass
    assert [each == "127.0.0.1" for each in where] == [alone]
    assert ray.util.get_node_ip_address() != "127.0.0.1", "only while it starts"
