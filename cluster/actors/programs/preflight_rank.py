"""A rank that trains and serves nothing: it says what its node is like, and measures the links to the other ranks.

Links are measured one after the other, all other ranks quiet: between neighbours of a node, and between the first ranks
of every two nodes, over the transport a model would use. A `Program` (see worker.py) without Ray. What is odd about the
answers is for launch.commands.preflight to say.
"""

from __future__ import annotations

import hashlib
import platform
import threading
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from cluster.actors.group.placement import Place
from cluster.actors.host.cpu_affinity import claim_cores, free_memory
from cluster.actors.programs.serve_spec import Device, Transport
from parallel.errors import CheckpointError
from parallel.native.compiled import library
from parallel.ranks.comm import Comm
from parallel.ranks.mesh import Groups, Wiring, connect, init_groups
from tp_decoders.hub.repository import here

if TYPE_CHECKING:
    from cluster.actors.group.worker import Phases, Program

TREE = Path(__file__).resolve().parents[3]
PACKAGES = ("parallel", "tp_decoders", "cluster", "launch")
EDGE_BYTES = 1 << 20
SMALL, ROUNDS = 4096, 50
"""Floats of the latency's all-reduce, as many as a token's hidden state, and how many of them."""
LARGE = {"cpu": 4 << 20, "cuda": 64 << 20}
LARGE_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Link:
    """Two ranks, or all of them, and how fast they add up."""

    ranks: tuple[int, ...]
    nodes: tuple[str, ...]
    latency_us: float  # of an all-reduce of 16 KB
    gigabytes_s: float  # bytes of a large tensor over the time of its all-reduce

    def better(self, other: Link) -> Link:
        """The best of two measurements: what disturbs one is rarely there for the other."""
        latency, bandwidth = min(self.latency_us, other.latency_us), max(self.gigabytes_s, other.gigabytes_s)
        return replace(self, latency_us=latency, gigabytes_s=bandwidth)


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """One rank's node. `software` must be equal everywhere."""

    software: dict[str, str]
    clock_s: float  # when rank 0's clock said `rank0_clock_s`
    rank0_clock_s: float
    free_bytes: int
    links: tuple[Link, ...] = ()  # rank 0's report has those of all


@dataclass(frozen=True, kw_only=True)
class PreflightSpec:
    """What is to be looked at: this many ranks, and a checkpoint if one is given."""

    model: str | None = None
    device: Device = "cpu"
    transport: Transport = "auto"
    whole_files: bool = False  # every byte of the checkpoint, not its names, sizes, and both ends of each file
    start_timeout_s: float = 600.0
    collective_timeout_s: float = 60.0

    def __call__(self, place: Place, phases: Phases) -> Program:
        return PreflightRank(self, place, phases)


@dataclass
class PreflightRank:
    """One rank; all is done in `start`, `run` only waits to be dismissed."""

    spec: PreflightSpec
    place: Place
    phases: Phases
    _groups: Groups | None = None
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> NodeFacts:
        spec, place = self.spec, self.place
        claim_cores(place, None, spec.device)
        with self.phases("building the kernels"):
            library.available()
        with self.phases("reading the checkpoint"):
            looks = spec.model is not None and place.local_rank == 0
            digest = checkpoint_digest(str(here(str(spec.model))), spec.whole_files) if looks else ""
        with self.phases("meeting the other ranks"):
            self._groups = init_groups(place.rank, place.world, place.world, 1, place.address, wiring=self._wiring())
        with self.phases("comparing clocks"):
            clock, reference = self._clocks()
        with self.phases("measuring links"):
            links = self._links() if place.world > 1 else []
        return NodeFacts(
            software=software(spec.device) | ({"checkpoint": digest} if digest else {}), clock_s=clock,
            rank0_clock_s=reference, free_bytes=free_memory(place, spec.device), links=tuple(links),
        )  # fmt: skip

    def run(self) -> None:
        self._stop.wait()

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        if self._groups is not None:
            self._groups.close()

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda", 0) if self.spec.device == "cuda" else torch.device("cpu")

    def _wiring(self, hostname: str | None = None) -> Wiring:
        spec = self.spec
        return Wiring(
            device=self._device, timeout_s=spec.collective_timeout_s, start_timeout_s=spec.start_timeout_s,
            transport=spec.transport, hostname=hostname, key=self.place.key,
        )  # fmt: skip

    def _clocks(self) -> tuple[float, float]:
        """This node's clock and rank 0's at the same moment, within the time a barrier takes."""
        assert self._groups is not None, "the ranks have met"
        if self.place.world == 1:
            return time.time(), time.time()
        self._groups.tp.talk.barrier()
        clock = torch.tensor([time.time()], dtype=torch.float64, device=self._device)
        all_clocks = self._groups.tp.talk.all_gather(clock, [1] * self.place.world, 0)
        return float(clock), float(all_clocks[0])

    def _links(self) -> list[Link]:
        """Every link, twice, in an order all ranks share; those of others are waited for."""
        assert self._groups is not None and self._groups.store is not None, "the ranks have met"
        nodes = [
            note.decode() for note in _notes(self._groups.store, self.place.rank, self.place.world, self.place.node)
        ]
        everyone = tuple(range(self.place.world))
        wanted = [*pairs(nodes), *([everyone] if len(everyone) > 2 else [])]
        first, second = ([self._link(ranks, nodes, turn) for ranks in wanted] for turn in range(2))
        return [link.better(again) for link, again in zip(first, second, strict=True)]

    def _link(self, ranks: tuple[int, ...], nodes: list[str], turn: int) -> Link:
        """One link, with all other ranks waiting; the first of its ranks tells the figures to everybody."""
        assert self._groups is not None and self._groups.store is not None, "the ranks have met"
        talk, rank, world = self._groups.tp.talk, self.place.rank, self.place.world
        figures = torch.zeros(2, dtype=torch.float64, device=self._device)
        if rank in ranks:
            prefix = dist.PrefixStore(f"link-{turn}-{'-'.join(map(str, ranks))}", self._groups.store)
            group = connect(prefix, ranks.index(rank), len(ranks), self._wiring(self.place.node))
            figures[:] = torch.tensor(measure(group.talk, self._device), dtype=torch.float64)
            group.talk.close()
        talk.barrier(self.spec.start_timeout_s)
        latency, bandwidth = talk.all_gather(figures, [2] * world, 0).view(-1, 2)[ranks[0]].tolist()
        where = tuple(dict.fromkeys(nodes[rank] for rank in ranks))
        return Link(ranks=ranks, nodes=where, latency_us=latency, gigabytes_s=bandwidth)


def pairs(nodes: list[str]) -> list[tuple[int, int]]:
    """The links worth measuring: each rank with the next of its node, and the first ranks of every two nodes."""
    firsts = {node: nodes.index(node) for node in nodes}
    inside = [
        (ranks[i], ranks[i + 1])
        for node in firsts
        for ranks in [[rank for rank, other in enumerate(nodes) if other == node]]
        for i in range(len(ranks) - 1)
    ]
    return inside + list(combinations(sorted(firsts.values()), 2))


def measure(talk: Comm, device: torch.device) -> tuple[float, float]:
    """Microseconds of a small all-reduce and gigabytes a second of a large one."""
    small = torch.ones(SMALL, device=device)
    large = torch.ones(LARGE[device.type], device=device)
    for warm in (small, large):
        talk.sum(warm)
    latency = _least_seconds(talk, small, ROUNDS)
    return latency * 1e6, large.nbytes / _least_seconds(talk, large, LARGE_ROUNDS) / 1e9


def checkpoint_digest(folder: str, whole_files: bool) -> str:
    """Of a checkpoint's files: names, sizes and both ends (where a safetensors file has its header), or every byte."""
    paths = sorted(path for path in Path(folder).glob("*") if path.is_file() and not path.name.startswith("."))
    if not any(path.name == "config.json" for path in paths):
        raise CheckpointError(f"{folder} has no config.json on {platform.node()}; is it mounted there?")
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if whole_files:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            digest.update(file.read(EDGE_BYTES))
            file.seek(max(0, size - EDGE_BYTES))
            digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()[:16]


def software(device: str) -> dict[str, str]:
    """What two nodes must agree on, by name."""
    found = {"python": platform.python_version(), "tp-decoders": tree_digest()}
    found |= {name: version(name) for name in ("torch", "ray", "transformers", "safetensors", "numpy")}
    if device == "cuda":
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        found["driver"] = driver()
        found["GPU"] = torch.cuda.get_device_name(0)
    else:
        found["processor"] = platform.machine()
    return found


def driver(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """NVIDIA's, as the kernel has it."""
    words = file.read_text(encoding="utf-8").split() if file.exists() else []
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "unknown")


def tree_digest(root: Path = TREE) -> str:
    """Of this project's own sources."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h") and "_build" not in path.parts:
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _least_seconds(talk: Comm, x: torch.Tensor, rounds: int) -> float:
    """Of an all-reduce, the quickest of all: what a link can do. The GPU's work is waited for."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        talk.sum(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _notes(store: dist.Store, rank: int, world: int, note: str) -> list[bytes]:
    store.set(f"node/{rank}", note)
    return [store.get(f"node/{other}") for other in range(world)]
