"""Every port of a running server against a table of what may listen: on loopback, and to no stranger's call."""

from __future__ import annotations

import http.client
from collections import Counter
from pathlib import Path

import grpc
import pytest

from launch.commands.server_process import Server
from parallel.native.compiled import library
from tests.listening import Listener, listeners
from tests.processes import arguments, family

NANO = Path(__file__).resolve().parents[2] / "data" / "gpt-nano-sort"
ALLOWED = {
    "launch serve": 3,  # gRPC, metrics, Ray's core worker
    "ray::Worker": 3,  # Ray's core worker; of rank 0 its engine's port and the ranks' store, too
    "ray::IDLE": 1,  # Ray's core worker
    "gcs_server": 1,
    "raylet/raylet": 3,  # leases, objects, and its metrics
    "ray::DashboardAgent": 3,  # gRPC and HTTP of the node's agent, its metrics
    "ray::RuntimeEnvAgent": 1,
    "log_monitor.py": 0,
}
"""Of each kind of process, the most ports that one of them has. docs/security.md says what guards them."""
PATHS = ("/", "/api/jobs/", "/api/v0/logs", "/logs", "/api/version", "/get_or_create_runtime_env", "/worker/traceback")
METHODS = (
    "CoreWorkerService/GetCoreWorkerStats", "CoreWorkerService/Exit", "CoreWorkerService/KillActor",
    "NodeManagerService/GetNodeStats", "NodeManagerService/ShutdownRaylet", "ObjectManagerService/Pull",
    "NodeInfoGcsService/GetAllNodeInfo", "InternalKVGcsService/InternalKVKeys", "JobInfoGcsService/AddJob",
    "ReporterService/GetTraceback", "LogService/ListLogs", "RuntimeEnvService/GetRuntimeEnvsInfo",
)  # fmt: skip
HARMLESS = (401, 403, 404, 405)


def kind(pid: int) -> str:
    words = arguments(pid)
    return next((name for name in ALLOWED if name in words), words[:60])


def said_to_a_stranger(where: Listener) -> list[str]:
    """What answers over HTTP or gRPC without a token."""
    return [*over_http(where), *over_grpc(where)]


def over_http(where: Listener) -> list[str]:
    found: list[str] = []
    for path in PATHS:
        connection = http.client.HTTPConnection("127.0.0.1", where.port, timeout=5)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException):  # it does not speak HTTP
            return found
        finally:
            connection.close()
        if answer.status not in HARMLESS and "text/plain; version" not in answer.headers.get("Content-Type", ""):
            found.append(f"{path}: {answer.status}")  # Prometheus's counters are known to be open
    return found


def over_grpc(where: Listener) -> list[str]:
    found: list[str] = []
    with grpc.insecure_channel(f"127.0.0.1:{where.port}", [("grpc.enable_http_proxy", 0)]) as channel:
        for method in METHODS:
            try:
                channel.unary_unary(f"/ray.rpc.{method}", bytes, bytes)(b"", timeout=3)
                found.append(method)
            except grpc.RpcError as error:
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    return found  # it does not speak gRPC
    return found


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_what_listens_is_allowed_reached_from_this_machine_alone_and_deaf_to_strangers() -> None:
    library.available()  # built here where it is not yet
    arguments_ = ["--model", str(NANO), "--preset", "small", "--cluster", "cpu-2", "--metrics-port", "0"]
    with Server(arguments_, timeout_s=400) as server:
        found = listeners(family(server.pid))
        shown = [f"{kind(each.pid)} {each.host}:{each.port}" for each in found]
        assert len(found) > 5 and sum("ray::Worker" in line for line in shown) == 4, shown
        assert not [line for line, each in zip(shown, found, strict=True) if not each.loopback], "others reach these"
        counts = Counter((kind(each.pid), each.pid) for each in found)
        assert not [(who, n) for (who, _), n in counts.items() if n > ALLOWED.get(who, 0)], shown
        assert not {line: said for line, each in zip(shown, found, strict=True) if (said := said_to_a_stranger(each))}
        assert server.running, "one of the calls ended it"
