"""The shell a rank runs in: holds one program, starts it, runs it until told to stop.

Plain Python without Ray: a test runs it in a thread. Everything the program does, from the rendezvous to its last
step, happens in the one thread that calls `run`, because collectives belong to one thread and a core is pinned per
thread; `ready`, `phase` and `stop` are called from others meanwhile. A program that only lost its peers may be kept,
with its weights, for the next `run`: a life more of the same process.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cluster.actors.group.placement import LOOPBACK, Place
from cluster.json_logs import JsonLines
from cluster.safe_text import PlainLines
from cluster.supervision import supervised
from parallel.errors import CollectiveError, WorkerError
from parallel.private_folder import no_file_for_everybody

log = logging.getLogger(__name__)
LOST_PEER = ("DistNetworkError", "DistStoreError", "DistBackendError")
"""What torch.distributed raises where another rank went away."""
ORPHAN_STOP_S = 10.0
"""How long each part of an orphaned rank's end may take."""


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


@runtime_checkable
class Rejoinable(Program, Protocol):
    """A program that can outlive its peers: what it holds itself is good for another group of the same shape."""

    def part(self, error: BaseException) -> bool:
        """After `run` raised: lets go of the peers; False where nothing is worth keeping, or not safe to keep."""
        ...

    def rejoin(self, make: MakeProgram, place: Place, phases: Phases) -> Any:
        """In place of start: the same place among new peers, who are starting. `make` is what they are made by."""
        ...


def is_consequence(error: BaseException | None) -> bool:
    """Whether a rank failed because of another one: its own process and memory are as good as before."""
    return isinstance(error, CollectiveError) or type(error).__name__ in LOST_PEER


@dataclass(frozen=True)
class Ready:
    """A rank that can work: what its program reported, where it runs, and where its start-up time went."""

    place: Place
    pid: int
    facts: Any
    seconds: dict[str, float] = field(default_factory=dict)


class Lease:
    """A process's right to go on without an owner: `end` is called once nobody has renewed it for `seconds`, of which
    only those count in which the process itself ran.
    """

    TICK_S = 0.5

    def __init__(self, seconds: float, end: Callable[[], None]) -> None:
        self.seconds, self.end = seconds, end
        self._left = seconds

    def renew(self) -> None:
        self._left = self.seconds

    def run_out(self) -> None:
        """Returns when it has."""
        last = time.monotonic()
        while self._left > 0:
            time.sleep(min(self.TICK_S, self.seconds / 4))
            now = time.monotonic()
            self._left -= min(now - last, 2 * self.TICK_S)
            last = now


class Life:
    """One run of a program, from its start to its end."""

    def __init__(self) -> None:
        self.phases = Phases()
        self.started = threading.Event()
        self.stopping = threading.Event()
        self.program: Program | None = None
        self.ready: Ready | None = None
        self.ended = threading.Event()
        self.error: Exception | None = None
        self.watchers = 0  # owners so far; the last one counts


def keep_nccl_here(place: Place) -> None:
    """Where all ranks share a machine NCCL listens to that machine alone, too; a setting of one's own counts. NCCL
    reads it once in a process: ranks with GPUs are never kept for another life (cluster.actors.programs.serve_rank).
    """
    if place.address is not None and place.address.startswith(f"tcp://{LOOPBACK}:"):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")


class Worker:
    """One rank's process: holds its program and forwards. `life` counts the group's lives, of which the first is 0."""

    def __init__(
        self, rank: int, log_level: int = logging.WARNING, log_json: bool = False, lease: Lease | None = None
    ) -> None:
        no_file_for_everybody()
        self.rank = rank
        self._lease = lease
        self._lives: dict[int, Life] = {}
        self._lock = threading.Lock()
        self._kept: Rejoinable | None = None
        handler = logging.StreamHandler()
        plain = PlainLines(f"%(levelname).1s rank {rank} %(name)s: %(message)s")
        handler.setFormatter(JsonLines(rank) if log_json else plain)
        logging.basicConfig(level=log_level, handlers=[handler])
        if lease is not None:
            supervised("lease", partial(self._until_orphaned, lease), lambda _: os._exit(1))  # nobody else would end it

    def __repr__(self) -> str:  # Ray prefixes this actor's output with it
        return f"rank {self.rank}"

    def pid(self) -> int:
        return os.getpid()

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def run(self, place: Place, make: MakeProgram) -> None:
        """One life of the rank; returns when it was stopped, raises what ended it."""
        life = self._life(place.life)
        try:
            kept, self._kept = self._kept, None
            keep_nccl_here(place)
            life.program = program = kept or make(place, life.phases)
            try:
                facts = kept.rejoin(make, place, life.phases) if kept else program.start()
                life.ready = Ready(place, os.getpid(), facts, life.phases.seconds)
                life.started.set()
                if not life.stopping.is_set():
                    program.run()
            except Exception as error:
                if life.ready is not None and isinstance(program, Rejoinable) and program.part(error):
                    self._kept = program
                raise
            finally:
                if self._kept is None:
                    program.close()
        except Exception as error:
            life.error = error
            raise
        finally:
            life.started.set()
            life.ended.set()

    def watch(self, life: int = 0) -> None:
        """For an owner that did not call `run` itself: ends as that life's run does. Ends, too, when the next owner
        watches."""
        current = self._life(life)
        with self._lock:
            current.watchers += 1
            mine = current.watchers
        while not current.ended.wait(0.2):
            if current.watchers != mine:
                raise WorkerError("another owner watches this rank now")
        if current.error is not None:
            raise current.error

    def standing(self, life: int = 0) -> Ready:
        """What it said when it was ready, if that life goes on."""
        current = self._life(life)
        if current.ready is None or current.ended.is_set():
            raise WorkerError(f"rank {self.rank} does not work any more")
        return current.ready

    def renew(self) -> None:
        """From the owner: the rank is still wanted."""
        if self._lease is not None:
            self._lease.renew()

    def ready(self, life: int = 0) -> Ready:
        """Waits for the start to end; what went wrong is for `run` to say."""
        current = self._life(life)
        current.started.wait()
        if current.ready is None:
            raise WorkerError(f"rank {self.rank} did not start")
        return current.ready

    def phase(self, life: int = 0) -> str:
        """Which part of the start is under way."""
        return self._life(life).phases.current

    def kept(self) -> bool:
        """Whether this process holds a program that can go on with new peers."""
        return self._kept is not None

    def stop(self, life: int = 0) -> None:
        current = self._life(life)
        current.stopping.set()
        if current.program is not None and current.ready is not None:
            current.program.stop()

    def _until_orphaned(self, lease: Lease) -> None:
        """Rank 0 stops the others; each gives the group's room back, so that one that hangs keeps nothing."""
        lease.run_out()
        log.warning("nobody has asked for this rank for %g s: it ends", lease.seconds)
        with self._lock:
            lives = dict(self._lives)
        for number, life in lives.items():
            self.stop(number)
            life.ended.wait(ORPHAN_STOP_S)
        try:
            lease.end()
            time.sleep(ORPHAN_STOP_S)
        finally:
            os._exit(0)

    def end_neighbour(self, pid: int) -> None:
        """Ends a frozen rank of the same host at once; Ray itself would first wait for it to end in order."""
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
                os.kill(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError, PermissionError) as error:
            log.debug("process %d was not ended: %s", pid, error)

    def _life(self, number: int) -> Life:
        with self._lock:
            return self._lives.setdefault(number, Life())
