"""A `tp-decoders serve` process of one's own: started, waited for, used at its address, ended in order.

For demonstrations and tests. It is the real command in a process of its own, not a shortcut past it.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from parallel.errors import WorkerError

READY = "ready: "
STOP_S = 120.0
"""A limit for what hangs: a busy machine takes its time."""


class Server:
    """`with Server(["--model", folder, "--tp", "2"]) as server:` then `server.address`, `server.ready`. `tree`: another
    checkout whose command it is."""

    def __init__(self, arguments: Sequence[str], timeout_s: float = 120.0, tree: Path | None = None) -> None:
        self._command = [sys.executable, "-m", "launch", "serve", "--port", "0", *arguments]
        self._timeout_s, self._tree = timeout_s, tree
        self._process: subprocess.Popen[str] | None = None
        self._last_words: list[str] = []
        self.ready = ""

    @property
    def address(self) -> str:
        return self.ready.removeprefix(READY).split()[0]

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self._tree,
            env=os.environ if self._tree is None else {**os.environ, "PYTHONPATH": str(self._tree)},
        )  # fmt: skip
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        assert self._process.stdout is not None and self._process.stderr is not None, "both were asked for"
        threading.Thread(target=_forward, args=(self._process.stdout, lines.put), daemon=True).start()
        threading.Thread(target=_forward, args=(self._process.stderr, self._last_words.append), daemon=True).start()
        try:
            self.ready = lines.get(timeout=self._timeout_s).strip()
        except queue.Empty:
            self.stop()
            raise WorkerError(f"the server was not ready within {self._timeout_s:g} s: {self.complaint}") from None
        if not self.ready.startswith(READY):
            self._process.wait(STOP_S)
            raise WorkerError(f"the server did not start: {self.complaint}")
        return self

    def stop(self) -> int:
        """Asks it to stop (SIGTERM) and returns its exit status."""
        assert self._process is not None, "the server was not started"
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise WorkerError(f"the server did not stop within {STOP_S:g} s of SIGTERM: {self.complaint}") from None

    def wait(self, timeout_s: float) -> int:
        """Its exit status, once it ends by itself."""
        assert self._process is not None, "the server was not started"
        return self._process.wait(timeout_s)

    @property
    def said(self) -> str:
        """Everything it wrote to stderr so far."""
        return "".join(self._last_words)

    @property
    def complaint(self) -> str:
        """What it said last on stderr."""
        return " ".join(line.strip() for line in self._last_words[-5:]) or "it said nothing"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = self.stop()
        if status != 0 and error is None:
            raise WorkerError(f"the server ended with status {status}: {self.complaint}")


def _forward(pipe: IO[str], take: Callable[[str], None]) -> None:
    """Every line, then an empty one at the end."""
    for line in pipe:
        take(line)
    take("")
