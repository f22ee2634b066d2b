"""What a signal asks of `serve`, by a real process with real signals and a real terminal, without a server."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest

SERVER = """
import asyncio, sys
from launch.serving.signals import Signals, end_undisturbed

async def main():
    signals = Signals(asyncio.get_running_loop())
    async def restart():
        print("restarts", file=sys.stderr, flush=True)
    signals.restart = restart
    print("ready", file=sys.stderr, flush=True)
    await signals.stop.wait()
    print("stops", file=sys.stderr, flush=True)
    await signals.again.wait()
    print("hurries", file=sys.stderr, flush=True)

asyncio.run(main())
end_undisturbed()
print("ends", file=sys.stderr, flush=True)
sys.stdin.read()
"""


def started(hangups: signal.Handlers = signal.SIG_DFL, terminal: int | None = None) -> subprocess.Popen[str]:
    def prepare() -> None:
        signal.signal(signal.SIGHUP, hangups)  # whatever these tests run under
        if terminal is not None:
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=prepare, pass_fds=[] if terminal is None else [terminal],
    )  # fmt: skip
    assert said(process) == "ready"
    return process


def said(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline().strip()


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ends = pty.openpty()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue  # closed by the test


def test_without_a_terminal_a_hangup_restarts_and_a_second_signal_hurries() -> None:
    with started() as process:
        for number, words in (
            (signal.SIGHUP, "restarts"), (signal.SIGHUP, "restarts"), (signal.SIGINT, "stops"),
            (signal.SIGINT, "hurries"),
        ):  # fmt: skip
            process.send_signal(number)
            assert said(process) == words
        assert said(process) == "ends"
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == 0, "the end was broken off"


def test_in_a_terminal_a_hangup_restarts_while_that_is_there_and_ends_the_server_when_it_is_closed(
    terminal: tuple[int, int],
) -> None:
    master, slave = terminal
    with started(terminal=slave) as process:
        process.send_signal(signal.SIGHUP)
        assert said(process) == "restarts"
        os.close(slave)
        os.close(master)  # the kernel sends SIGHUP
        assert said(process) == "SIGHUP: the terminal was closed, and the server ends"
        assert said(process) == "stops"
        process.terminate()
        assert said(process) == "hurries"


def test_a_hangup_that_is_ignored_from_the_start_stays_so() -> None:
    with started(hangups=signal.SIG_IGN) as process:  # as nohup does
        process.send_signal(signal.SIGHUP)
        process.terminate()
        assert said(process) == "stops", "and nothing was restarted"
        process.terminate()
        assert said(process) == "hurries"
