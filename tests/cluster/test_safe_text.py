"""What comes from elsewhere cannot pass for a line of our logs, nor steer a terminal."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator

import pytest

from cluster.actors.group.worker import Worker
from cluster.actors.host import rank_output
from cluster.json_logs import REQUEST, JsonLines
from cluster.safe_text import PlainLines, for_terminal, visible
from launch.main import main
from launch.observe import log_setup

FORGED = "06:00:00 E cluster.access.roles: token 'admin' was used"
BREAKS = ["\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
"""All that str.splitlines knows."""
STEERING = [
    "\x1b[2J",
    "\x9b2J",
    "\x08",
    "\x00",
    "\x7f",
    "\u202e",
    "\u2066",
    "\u200f",
    "\u061c",
    "\ufeff",
    "\ud800",
    "\U000e0041",
]


@pytest.fixture(autouse=True)
def the_root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def rank(as_json: bool) -> None:
    logging.getLogger().handlers.clear()
    Worker(1, logging.INFO, log_json=as_json)


def command(as_json: bool) -> None:
    log_setup.configure(verbose=True, as_json=as_json)


@pytest.mark.parametrize("process", [rank, command])
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("evil", BREAKS + STEERING, ids=ascii)
def test_a_record_is_one_line_whatever_it_holds(
    process: Callable[[bool], None], as_json: bool, evil: str, capsys: pytest.CaptureFixture[str]
) -> None:
    process(as_json)
    name = f"x{evil}{FORGED}"
    token = REQUEST.set(name)
    logging.getLogger("cluster.rpc").warning("request %s is over", name)
    REQUEST.reset(token)
    said = capsys.readouterr().err
    assert said.endswith("\n") and len(said.splitlines()) == 1 and evil[0] not in said[:-1]
    if as_json:
        assert json.loads(said)["message"] == f"request {name} is over" and json.loads(said)["request_id"] == name


@pytest.mark.parametrize("evil", BREAKS + STEERING, ids=ascii)
def test_what_an_exception_says_is_below_its_record_and_indented(evil: str) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(PlainLines(log_setup.FORMAT, "%H:%M:%S"))
    try:
        raise ValueError(f"bad name 'x{evil}{FORGED}'")
    except ValueError:
        handler.handle(logging.LogRecord("here", logging.ERROR, "", 1, "failed", (), sys.exc_info()))
    first, *rest = written.getvalue().splitlines()
    assert first.endswith("E here: failed") and all(line.startswith("    ") for line in rest)
    assert evil == "\n" or evil not in written.getvalue()


def test_what_a_rank_prints_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    rank_output.show({"pid": 1, "lines": [f"\x1b[36mx\r\x1b]0;title\x07{FORGED}"]})
    assert capsys.readouterr().err == f"(process pid=1) x\\r\\x1b]0;title\\x07{FORGED}\n"


def test_errors_on_a_terminal_are_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "/nowhere/\x1b[2J\n" + FORGED, "/nowhere/out"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "\x1b" not in said and "\\x1b[2J\\n" in said


def test_words_of_every_language_stay_as_they_are() -> None:
    words = "naïve 日本語 עברית مرحبا 👩\u200d👩\u200d👧 c:\\new"
    assert visible(words) == words and for_terminal(f"{words}\n\tmore") == f"{words}\n\tmore"
    assert json.loads(JsonLines().format(logging.LogRecord("a", 20, "", 1, words, (), None)))["message"] == words
    assert words.split("\\")[0] in JsonLines().format(logging.LogRecord("a", 20, "", 1, words, (), None))


def test_text_for_a_terminal_keeps_its_lines() -> None:
    assert for_terminal("a\n\tb\x1b[31m\r\u202ec") == "a\n\tb\\x1b[31m\\r\\u202ec"
