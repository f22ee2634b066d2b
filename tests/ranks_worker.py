"""The worker process of tests/ranks.py: loads test functions by file path and runs them with a Group.

Started as `ranks_worker.py RANK PORT FD [CACHE FLAGS...]`: the store's port on 127.0.0.1, the descriptor of the pipe to
the pool, and a native library that is not the usual one. It ends with its parent. Groups
are kept from call to call, one per (pool generation, size, kind of comm).
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.util
import multiprocessing.connection as mpc
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from parallel.native.compiled.library import configure
from parallel.ranks.group import Group
from parallel.ranks.mesh import Wiring, connect

COMM_TIMEOUT_S = 60.0
PR_SET_PDEATHSIG = 1


class Worker:
    """One rank of the pool."""

    def __init__(self, rank: int, port: int) -> None:
        self.rank = rank
        self.store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=COMM_TIMEOUT_S))
        self.groups: dict[tuple[int, int, str], Group] = {}
        self.modules: dict[str, ModuleType] = {}

    def answer(self, job: bytes) -> bytes:
        """Run one call and pack (time, value, error, whether the comm broke), whatever the function raised."""
        generation, size, kind, call, args = pickle.loads(job)
        try:
            function = self.load(*call)
            group = self.group(generation, size, kind)
            value = function(group, *pickle.loads(args))
            broken = group.comm is not None and group.comm.broken is not None
            return pickle.dumps((time.monotonic(), value, None, broken))
        except BaseException as error:  # whatever it was, the pool raises it again
            raised_at = time.monotonic()
            self.forget(generation, size, kind)
            return pickle.dumps((raised_at, None, self.portable(error), True))

    def load(self, path: str, module_name: str, qualname: str) -> Callable[..., Any]:
        module = self.modules.get(path)
        if module is None:
            spec = importlib.util.spec_from_file_location(module_name, path)
            if spec is None or spec.loader is None:
                raise ImportError(f"{path} is not a Python file")
            module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.modules[path] = module
        found: Any = module
        for name in qualname.split("."):
            found = getattr(found, name)
        return found  # type: ignore[no-any-return]

    def group(self, generation: int, size: int, kind: str) -> Group:
        if size == 1:
            return Group.single()
        for old in [key for key in self.groups if key[0] != generation]:
            self.forget(*old)
        key = (generation, size, kind)
        if key not in self.groups:
            store = dist.PrefixStore("/".join(map(str, key)), self.store)
            self.groups[key] = connect(store, self.rank, size, self.wiring(kind))
        return self.groups[key]

    def wiring(self, kind: str) -> Wiring:
        return Wiring(transport=kind, timeout_s=COMM_TIMEOUT_S, hostname="127.0.0.1")  # type: ignore[arg-type]

    def forget(self, generation: int, size: int, kind: str) -> None:
        """Close a group whose call failed, so that peers still waiting in it fail at once."""
        group = self.groups.pop((generation, size, kind), None)
        if group is not None and group.comm is not None:
            group.comm.close()

    def portable(self, error: BaseException) -> BaseException:
        """The exception with this rank's traceback as a note; its text alone where it cannot be pickled."""
        text = f"on rank {self.rank}:\n{''.join(traceback.format_exception(error))}"
        error.add_note(text)
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an exception class with its own constructor or unpicklable contents
            return RuntimeError(text)
        return error


def main() -> None:
    rank, port, fd = map(int, sys.argv[1:4])
    if len(sys.argv) > 4:
        configure(sys.argv[4], flags=sys.argv[5:])
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # else two busy ranks may share a core for a long time
    worker = Worker(rank, port)
    pipe = mpc.Connection(fd)
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(worker.answer(job))


if __name__ == "__main__":
    main()
