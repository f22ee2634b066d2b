"""Run as a program: the most anonymous memory a rank's `load` takes. Arguments: folder, a small one, rank, size, dtype,
"packed" or "plain"; prints JSON.

File pages of a mapped checkpoint are the kernel's and are not counted. A thread samples while the load runs, as often
as it can.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import torch

from parallel.ranks.group import Group
from tp_decoders import load

PAGE = os.sysconf("SC_PAGE_SIZE")


class Sampler:
    """The largest RssAnon (resident minus shared pages) seen."""

    def __init__(self) -> None:
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.most = 0
        self.samples = 0

    def now(self) -> int:
        _, resident, shared, *_ = os.pread(self._statm, 200, 0).split()
        return (int(resident) - int(shared)) * PAGE

    def _run(self) -> None:
        while not self._stop.is_set():
            self.most = max(self.most, self.now())
            self.samples += 1

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = max(self.most, self.now())


def main(folder: str, warm: str, rank: int, size: int, dtype: str, packed: bool) -> None:
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    load(warm, group=Group(rank, size), packed=packed)  # whatever is made once per process
    sampler = Sampler()
    before = sampler.now()
    with sampler:
        model = load(folder, group=Group(rank, size), dtype=getattr(torch, dtype), packed=packed)
        held = sampler.now() - before
    shard = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"peak": sampler.most - before, "held": held, "shard": shard, "samples": sampler.samples}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6] == "packed")
