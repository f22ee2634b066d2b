"""`tp-decoders status` over a real server with a fake engine: what a person sees, as JSON, and when it is not ready."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from cluster.frontend.frontend import Frontend
from cluster.frontend.readiness import Readiness
from cluster.link.local_link import LocalLink
from cluster.rpc.server import build_server
from cluster.rpc.services.control_service import ServiceInfo
from launch.client import status
from launch.main import main
from tests.cluster.frontend.fakes import CODEC, FakeEngine


def at_a_server(engine: FakeEngine, act: Callable[[str, Frontend], Any], *others: FakeEngine) -> Any:
    """What `act` returns, run in a thread beside a server at the address it is given."""

    async def serve() -> Any:
        links = [LocalLink(each) for each in (engine, *others)]
        frontend = Frontend(links, codec=CODEC)
        readiness = Readiness(frontend)
        info = ServiceInfo(
            model_id="fake", family="none", dtype="float32", kernels="avx2 amx32", tensor_parallel_size=2
        )
        server = build_server(frontend, "127.0.0.1:0", info=info, readiness=readiness)
        frontend.start()
        await readiness.prove()
        await server.start()
        try:
            return await asyncio.to_thread(act, f"127.0.0.1:{server.port}", frontend)
        finally:
            await server.stop(1.0)
            await frontend.close()

    return asyncio.run(serve())


def command(*flags: str) -> Callable[[str, Frontend], int]:
    return lambda address, _: main(["status", "--address", address, *flags])


def test_a_person_sees_state_health_load_and_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert at_a_server(FakeEngine(), command()) == 0
    said = capsys.readouterr().out
    assert "SERVING, ready  up 0:0" in said and "0 restarts" in said
    assert "health    server SERVING  Inference SERVING  Training SERVING  Control SERVING" in said
    assert "model     fake (none, float32)  tp=2 dp=1" in said and "  kernels avx2 amx32\n" in said
    assert "0 of 65536 blocks held" in said and "training  off" in said


def test_a_server_whose_canary_found_a_fault_is_not_ready_and_the_exit_status_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert at_a_server(FakeEngine(canary_fault="rank 1 computes nonsense"), command()) == 1
    said = capsys.readouterr().out
    assert "NOT READY: rank 1 computes nonsense" in said
    assert "Inference NOT_SERVING" in said and "Control SERVING" in said, "it lives, and is not ready"


def test_an_engine_that_is_gone_is_shown_with_the_cause(capsys: pytest.CaptureFixture[str]) -> None:
    def act(address: str, frontend: Frontend) -> int:
        frontend._loop.call_soon_threadsafe(frontend.fail, "rank 1 on 10.0.0.2: killed")
        return main(["status", "--address", address])

    assert at_a_server(FakeEngine(), act) == 1
    said = capsys.readouterr().out
    assert "FAILED" in said and "fault     rank 1 on 10.0.0.2: killed" in said and "engine    no answer" in said


def test_each_replica_has_its_lines_and_one_that_is_out_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    def act(address: str, frontend: Frontend) -> int:
        frontend._loop.call_soon_threadsafe(frontend.fault, "rank 0 on node-b: its process died", 1)
        return main(["status", "--address", address])

    assert at_a_server(FakeEngine(), act, FakeEngine()) == 0, "one replica serves"
    said = capsys.readouterr().out
    assert "SERVING, ready" in said and "fault     replica 1: rank 0 on node-b: its process died" in said
    assert "replica 0  ready  0 open, 0 tokens outstanding  0 restarts  routed 0 by prefix, 0 by load" in said
    assert "replica 1  OUT: rank 0 on node-b: its process died  0 open" in said


def test_json_is_one_object_with_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert at_a_server(FakeEngine(), command("--json")) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["server"]["ready"] is True and values["health"]["Inference"] == "SERVING"
    assert values["load"]["kv_blocks_total"] == 1 << 16 and values["load"]["ranks"] == []
    assert "training" in values["refused"]


def test_a_second_look_shows_how_fast_tokens_come() -> None:
    def act(address: str, _: Frontend) -> list[str]:
        parser = argparse.ArgumentParser()
        status.add_arguments(parser)
        first = asyncio.run(status.look(parser.parse_args(["--address", address])))
        load = {**first.load, "generated_tokens": first.load["generated_tokens"] + 50}
        second = status.Status(**{**vars(first), "at": first.at + 2.0, "load": load})
        return list(status.lines(second, first))

    assert any("now 25.0 and 0.0 tokens/s" in line for line in at_a_server(FakeEngine(), act))


def test_nobody_at_the_address_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "TIMEOUT_S", 0.3)
    assert main(["status", "--address", "127.0.0.1:9"]) == 1
    assert "no server answered" in capsys.readouterr().err
