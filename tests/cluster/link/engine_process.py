"""A fake engine behind an EngineServer in a second process, for tests of what happens when that process dies."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from cluster.link.engine_server import EngineServer
from cluster.link.socket_link import SocketLink
from tests.cluster.frontend.fakes import FakeEngine


class EngineProcess:
    """Rank 0, played by a fake engine."""

    def __init__(self, step_seconds: float, crash_at_step: int | None) -> None:
        self.authkey = secrets.token_bytes(32)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        args = (there, self.authkey, step_seconds, crash_at_step)
        self.process = context.Process(target=_serve, args=args, daemon=True)
        self.process.start()
        assert here.poll(120), "the engine's process did not start"
        self.address = here.recv()

    def link(self, timeout: float = 60.0) -> SocketLink:
        return SocketLink(self.address, self.authkey, timeout)

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join(10)


@contextmanager
def engine_process(step_seconds: float = 0.0, crash_at_step: int | None = None) -> Iterator[EngineProcess]:
    process = EngineProcess(step_seconds, crash_at_step)
    try:
        yield process
    finally:
        process.end()


def _serve(parent: Connection, authkey: bytes, step_seconds: float, crash_at_step: int | None) -> None:
    server = EngineServer(FakeEngine(step_seconds=step_seconds, crash_at_step=crash_at_step), authkey)
    parent.send(server.address)
    server.serve()
