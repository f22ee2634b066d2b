"""Logs as lines of JSON: what a collector needs is there, in the front-end and on ranks."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator

import pytest

from cluster.actors.group.worker import Worker
from cluster.frontend.frontend import Frontend
from cluster.frontend.output.streams import collect
from cluster.frontend.requests.call import Call, Prompt
from cluster.json_logs import REQUEST, JsonLines
from cluster.link.local_link import LocalLink
from launch.observe import log_setup
from tests.cluster.frontend.fakes import CODEC, FakeEngine


@pytest.fixture(autouse=True)
def the_root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def records(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_every_line_is_an_object_with_the_request_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    async def serve() -> None:
        frontend = Frontend(LocalLink(FakeEngine()), codec=CODEC)
        frontend.start()
        stream = await frontend.open(Call(prompts=(Prompt(text="abc"),), request_id="mine"))
        await collect(stream, 1)
        logging.getLogger("cluster.rpc").error('something of this call, "quoted"\nand two lines')
        await frontend.close()

    log_setup.configure(verbose=True, as_json=True)
    asyncio.run(serve())
    found = records(capsys.readouterr().err)
    ended = next(record for record in found if "is over after" in str(record["message"]))
    assert ended["request_id"] == "mine" and ended["level"] == "info" and ended["node"] and ended["pid"]
    other = next(record for record in found if record["logger"] == "cluster.rpc")
    assert other["request_id"] == "mine" and str(other["message"]).endswith("\nand two lines")


def test_a_rank_says_which_one_it_is_and_what_was_raised(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger().handlers.clear()
    Worker(3, logging.INFO, log_json=True)
    try:
        _ = 1 // 0
    except ZeroDivisionError:
        logging.getLogger("cluster.engine").exception("failed")
    (record,) = records(capsys.readouterr().err)
    assert record["rank"] == 3 and record["level"] == "error" and "ZeroDivisionError" in str(record["exception"])
    assert "request_id" not in record


def test_without_the_option_lines_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    log_setup.configure(verbose=False)
    logging.getLogger("launch").warning("a word")
    line = capsys.readouterr().err
    assert line.strip().endswith("W launch: a word") and REQUEST.get() == ""
    assert json.loads(JsonLines(0, "n").format(logging.makeLogRecord({"msg": "é", "levelname": "INFO"})))["node"] == "n"
