"""Persistent worker processes for tests: run a function of a test module on several ranks at once.

`Ranks().run(3, fn, a, b)` calls `fn(group, a, b)` on ranks 0, 1 and 2 and returns their three results. The processes
start once (torch is imported once), on demand, and are reused by every later call; smaller sizes use the first ones.
The first failure is raised again here with its rank's traceback. A call past its limit ends its processes and fails.
`fn` is a module-level function; the worker loads its file by path, so test modules need no package.
"""

from __future__ import annotations

import multiprocessing.connection as mpc
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.native.compiled import library

WORKER = Path(__file__).with_name("ranks_worker.py")
ROOT = Path(__file__).resolve().parents[1]


class RankDied(RuntimeError):
    """A worker process ended while it ran a test function."""


class RankTooSlow(RuntimeError):
    """A test function did not return within its limit on some rank."""


@dataclass
class Outcome:
    """What one rank made of one call: a value, or an exception and when it was raised."""

    value: Any = None
    error: BaseException | None = None
    raised_at: float = 0.0
    broken: bool = True


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Any = field(repr=False)  # multiprocessing.connection.Connection, which has no one name on all systems

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.wait()


class Ranks:
    """A pool of worker processes that grows to the largest size asked for."""

    def __init__(self, limit: float = 200.0) -> None:
        self.limit = limit
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=limit)
        )
        self._workers: list[_Worker] = []
        self._generation = 0

    def run(
        self, size: int, fn: Callable[..., Any], *args: Any, comm: str = "shm", limit: float | None = None
    ) -> list[Any]:
        """fn(group, *args) on every rank; the results in rank order, or the first failure raised again."""
        outcomes = self.outcomes(size, fn, *args, comm=comm, limit=limit)
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        if failed:
            raise min(failed, key=lambda outcome: outcome.raised_at).error  # type: ignore[misc]
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self, size: int, fn: Callable[..., Any], *args: Any, comm: str = "shm", limit: float | None = None
    ) -> list[Outcome]:
        """As `run`, but failures are returned in their rank's place, a killed process's too."""
        self._grow(size)
        call = (str(Path(fn.__code__.co_filename).resolve()), fn.__module__, fn.__qualname__)
        job = pickle.dumps((self._generation, size, comm, call, pickle.dumps(args)))
        for worker in self._workers[:size]:
            worker.pipe.send_bytes(job)
        outcomes = self._collect(size, fn.__qualname__, limit or self.limit)
        if any(outcome.broken for outcome in outcomes):
            self._generation += 1  # comms that failed may be out of step: later calls make new ones
        return outcomes

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def _grow(self, size: int) -> None:
        for rank, worker in enumerate(self._workers):
            if worker.process.poll() is not None:
                worker.stop()
                self._workers[rank] = self._start(rank)
                self._generation += 1
        if size > len(self._workers):
            library.available()  # builds the native library here: a call's limit is for the call
        for rank in range(len(self._workers), size):
            self._workers.append(self._start(rank))

    def _start(self, rank: int) -> _Worker:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(self._store.port), str(theirs.fileno()), *built_like_here()],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        return _Worker(process, mpc.Connection(ours.detach()))

    def _collect(self, size: int, name: str, limit: float) -> list[Outcome]:
        deadline = time.monotonic() + limit
        outcomes: dict[int, Outcome] = {}
        waiting = {self._workers[rank].pipe: rank for rank in range(size)}
        while waiting:
            ready = mpc.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                outcomes[rank] = self._receive(rank, name)
            if not ready:
                self._end_slow(list(waiting.values()), outcomes, name, limit)
                waiting.clear()
        return [outcomes[rank] for rank in range(size)]

    def _receive(self, rank: int, name: str) -> Outcome:
        worker = self._workers[rank]
        try:
            raised_at, value, error, broken = pickle.loads(worker.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            code = worker.process.wait()
            died = RankDied(f"rank {rank} died (exit status {code}) in {name}")
            return Outcome(error=died, raised_at=time.monotonic())
        return Outcome(value, error, raised_at, broken)

    def _end_slow(self, ranks: Sequence[int], outcomes: dict[int, Outcome], name: str, limit: float) -> None:
        for rank in ranks:  # faulthandler prints where each one stands
            self._workers[rank].process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        message = f"{name} took more than {limit:g} s on ranks {sorted(ranks)} (their stacks are on stderr)"
        for rank in ranks:
            self._workers[rank].process.kill()
            self._workers[rank].process.wait()
            outcomes[rank] = Outcome(error=RankTooSlow(message), raised_at=time.monotonic())


def built_like_here() -> list[str]:
    """For workers: cache and flags of a library that was configured here, a sanitiser's (tests/sanitized.py)."""
    flags = library.extra_flags()
    return [str(library.cache_dir()), *flags] if flags else []


def free_address() -> str:
    """file:///PATH of a store in a new folder that only this user can read: ranks of one host need no port."""
    return f"file://{tempfile.mkdtemp(prefix='ranks-')}/store"
