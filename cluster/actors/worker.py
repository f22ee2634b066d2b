"""The shell a rank runs in: holds one program, starts it, runs it until told to stop.

Plain Python without Ray: a test runs it in a thread. Everything the program does, from the rendezvous to its last
step, happens in the one thread that calls `run`, because collectives belong to one thread and a core is pinned per
thread; `ready`, `phase` and `stop` are called from others meanwhile.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cluster.actors.place import Place
from parallel.errors import WorkerError


class Phases:
    """How long each part of a start took, and which one is under way."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._current = "nothing yet"
        self._since = time.monotonic()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._current, self._since = name, time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - self._since

    @property
    def current(self) -> str:
        return f"{self._current}, for {time.monotonic() - self._since:.1f} s"


class Program(Protocol):
    """What a rank does."""

    def start(self) -> Any:
        """Everything up to being able to work; returns the facts the group's owner wants to know (they must pickle)."""
        ...

    def run(self) -> None:
        """Works until stopped; in the thread that called start."""
        ...

    def stop(self) -> None:
        """Called from another thread: `run` returns soon after. Ranks that follow rank 0 may leave it to rank 0."""
        ...

    def close(self) -> None:
        """Always called last, after a failure too, in the thread that called start."""
        ...


MakeProgram = Callable[[Place, Phases], Program]


@dataclass(frozen=True)
class Ready:
    """A rank that can work: what its program reported, where it runs, and where its start-up time went."""

    place: Place
    pid: int
    facts: Any
    seconds: dict[str, float] = field(default_factory=dict)


class Worker:
    """One rank's process: holds its program and forwards."""

    def __init__(self, rank: int, log_level: int = logging.WARNING) -> None:
        self.rank = rank
        self._phases = Phases()
        self._program: Program | None = None
        self._started = threading.Event()
        self._stopping = threading.Event()
        self._ready: Ready | None = None
        logging.basicConfig(level=log_level, format=f"%(levelname).1s rank {rank} %(name)s: %(message)s")

    def __repr__(self) -> str:  # Ray prefixes this actor's output with it
        return f"rank {self.rank}"

    def pid(self) -> int:
        return os.getpid()

    def code_root(self) -> str:
        """The folder this process imports the project from."""
        return str(Path(__file__).resolve().parents[2])

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def run(self, place: Place, make: MakeProgram) -> None:
        """The rank's whole life; returns when it was stopped, raises what ended it."""
        try:
            self._program = make(place, self._phases)
            try:
                facts = self._program.start()
                self._ready = Ready(place, os.getpid(), facts, self._phases.seconds)
                self._started.set()
                if not self._stopping.is_set():
                    self._program.run()
            finally:
                self._program.close()
        finally:
            self._started.set()

    def ready(self) -> Ready:
        """Waits for the start to end; what went wrong is for `run` to say."""
        self._started.wait()
        if self._ready is None:
            raise WorkerError(f"rank {self.rank} did not start")
        return self._ready

    def phase(self) -> str:
        """Which part of the start is under way."""
        return self._phases.current

    def stop(self) -> None:
        self._stopping.set()
        if self._program is not None and self._ready is not None:
            self._program.stop()
