"""A rank's lines are shown as they are: no colours, no prefix, nothing of Ray's C++ between them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from cluster.actors.host import rank_output
from cluster.actors.host.rank_output import NAME, RAYS, show, show_rank_output
from launch.observe import log_setup

LINE = "W rank 1 cluster.engine: slow"
CPP = "[2026-11-29 11:20:00,123 E 4711 4712] core_worker.cc:123: The raylet has died"


@pytest.fixture(autouse=True)
def the_root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def batch(*lines: str, pid: object = 4711) -> dict[str, object]:
    return {"pid": pid, "ip": "10.0.0.1", "is_err": True, "lines": list(lines), "actor_name": "rank 1"}


def test_lines_come_with_their_process_and_without_colours_or_rays_own(capsys: pytest.CaptureFixture[str]) -> None:
    log_setup.configure(verbose=True)
    show(batch(f"\x1b[36m{LINE}\x1b[0m", CPP))
    show(batch("Raylet is starting", pid="raylet"))
    assert capsys.readouterr().err == f"(rank 1 pid=4711) {LINE}\n"


def test_with_json_logs_every_line_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    log_setup.configure(verbose=True, as_json=True)
    show(batch(json.dumps({"message": "slow", "rank": 1}), "something a library prints", CPP))
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [record["message"] for record in found] == ["slow", "process 4711: something a library prints"]


def test_it_takes_the_place_of_rays_printer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = rank_output.dispatcher.handlers
    monkeypatch.setattr(rank_output.dispatcher, "handlers", [*handlers, (RAYS, print)])
    show_rank_output()
    show_rank_output()
    names = [name for name, _ in rank_output.dispatcher.handlers]
    assert names.count(NAME) == 1 and RAYS not in names
