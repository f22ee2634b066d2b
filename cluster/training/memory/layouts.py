"""Which layouts of a number of ranks fit into their memory, in which order, and why; or the nearest that would.

The order is that of an estimated step: arithmetic, what recomputation adds to it, and bytes between ranks at the
speeds of `Speeds`. Its seconds only rank layouts of one machine; they promise nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from cluster.training.memory.estimate import (
    Layout,
    RankMemory,
    Setup,
    joined,
    lasting,
    passing,
    serving_memory,
    shard,
)
from cluster.training.memory.lasting_memory import StaticBytes
from cluster.training.memory.pass_memory import Collectives, PassCost
from cluster.training.step.flops import ModelFlops
from parallel.errors import ConfigError
from tp_decoders.model.config import DecoderConfig

EXTRA = {"none": 0.0, "selective": 0.03, "full": 1.0}
"""Of a forward, that recomputation runs again."""
MORE = (2, 4, 8, 16, 32)
"""Times the ranks that are tried where nothing fits."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Of one rank: floating-point operations per second, bytes per second within a node and beyond, seconds of a
    collective.
    """

    flops: float
    inside: float
    across: float
    latency: float


SPEEDS = {
    "cuda": Speeds(flops=400e12, inside=200e9, across=25e9, latency=20e-6),  # an H100 or alike, NVLink, 200 Gb/s each
    "cpu": Speeds(flops=100e9, inside=5e9, across=1e9, latency=20e-6),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be placed on what."""

    config: DecoderConfig
    ranks: int
    memory: int  # bytes of each rank
    per_node: int
    setup: Setup
    sequence: int  # tokens of a sample
    batch_size: int  # samples of a step, over all replicas
    serve: bool = False
    streams: int = 16  # sequences served at once

    def __post_init__(self) -> None:
        for name in ("ranks", "memory", "per_node", "sequence", "batch_size", "streams"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.sequence > self.config.max_positions:
            raise ConfigError(
                f"sequences of {self.sequence} tokens for a model with {self.config.max_positions} positions; give at "
                "most so many"
            )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout, the memory of its fullest rank, what a step sends and how long it may take."""

    layout: Layout
    memory: RankMemory
    seconds: float
    traffic: Collectives
    reasons: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The layouts that fit, best first, and those that do not, least first."""

    question: Question
    fitting: tuple[Candidate, ...]
    others: tuple[Candidate, ...]


def make_plan(question: Question) -> Plan:
    """All layouts of the question's ranks, weighed and ordered."""
    return _planned(question, _Scale(question))


def _planned(question: Question, scale: _Scale) -> Plan:
    found = [scale.weigh(question, layout) for layout in layouts(question)]
    if not found:
        raise ConfigError(
            f"{question.ranks} ranks: no tp x dp of them gives every rank an attention head (there are "
            f"{question.config.n_heads}) and every replica one of {question.batch_size} samples"
        )
    fitting = sorted((c for c in found if c.memory.total <= question.memory), key=lambda c: c.seconds)
    others = sorted((c for c in found if c.memory.total > question.memory), key=lambda c: c.memory.total)
    return Plan(question=question, fitting=tuple(fitting), others=tuple(others))


def nearest(question: Question) -> tuple[Question, Candidate] | None:
    """The same with as few more ranks as it takes, doubling; None where many times as many would not do."""
    scale = _Scale(question)
    for times in MORE:
        ranks = times * question.ranks
        more = replace(question, ranks=ranks, batch_size=max(question.batch_size, ranks))
        plan = _planned(more, scale)
        if plan.fitting:
            return more, plan.fitting[0]
    return None


def layouts(question: Question) -> Iterator[Layout]:
    """Every way to divide the ranks in which each rank has work."""
    for tp in range(1, question.ranks + 1):
        dp = question.ranks // tp
        if question.ranks % tp or tp > question.config.n_heads:
            continue
        if question.serve:
            yield Layout(tp=tp, dp=dp)
        elif dp <= question.batch_size:
            for recompute in ("none", "selective", "full"):
                for sequence_parallel in (False, True) if tp > 1 else (False,):
                    yield Layout(tp=tp, dp=dp, recompute=recompute, sequence_parallel=sequence_parallel)  # type: ignore[arg-type]


class _Scale:
    """Weighs layouts of questions about one model and setup; what several of them share is found once."""

    def __init__(self, question: Question) -> None:
        self._lasting: dict[tuple[int, int], StaticBytes] = {}
        self._passing: dict[Layout, PassCost] = {}
        self._flops = None if question.serve else ModelFlops.of(shard(question.config, 1, question.setup, 0))

    def weigh(self, question: Question, layout: Layout) -> Candidate:
        return _served(question, layout) if self._flops is None else self._trained(question, layout, self._flops)

    def _trained(self, question: Question, layout: Layout, flops: ModelFlops) -> Candidate:
        alike, division = replace(layout, dp=1), (layout.tp, layout.dp)
        if alike not in self._passing:
            self._passing[alike] = passing(question.config, alike, question.setup)
        if division not in self._lasting:
            self._lasting[division] = lasting(question.config, *division, question.setup)
        cost = self._passing[alike]
        memory = joined(self._lasting[division], cost, question.setup)
        samples = -(-question.batch_size // layout.dp)
        traffic = cost.collectives.times(-(-samples * question.sequence // question.setup.tokens))
        again = EXTRA[layout.recompute] / (3 if question.setup.lora is None else 2)
        work = flops([question.sequence] * samples) / layout.tp * _unevenness(question, layout.tp) * (1 + again)
        seconds = work / SPEEDS[question.setup.device].flops + _sending(question, layout, traffic, memory.gradients)
        reasons = tuple(_reasons(question, layout, traffic))
        return Candidate(layout=layout, memory=memory, seconds=seconds, traffic=traffic, reasons=reasons)


def _served(question: Question, layout: Layout) -> Candidate:
    inside, speeds = _inside(question, layout.tp), SPEEDS[question.setup.device]
    memory = serving_memory(question.config, layout.tp, question.setup, question.streams * question.sequence)
    read = (memory.packed or memory.weights) + memory.kv_cache  # once per decoding step: fewer bytes, sooner
    seconds = read / (10 * speeds.inside) + _hops(question, layout.tp) * (1 if inside else 10) * speeds.latency
    reasons = (_where(layout.tp, inside), f"{layout.dp} server(s) of {layout.tp} rank(s)")
    return Candidate(layout=layout, memory=memory, seconds=seconds, traffic=Collectives.none(), reasons=reasons)


def _hops(question: Question, tp: int) -> int:
    """Collectives of a decoding step, about two per layer."""
    return 2 * question.config.n_layers if tp > 1 else 0


def _sending(question: Question, layout: Layout, traffic: Collectives, gradients: int) -> float:
    """Seconds of a step that tensor-parallel sums take, and the sum of gradients and gathering of weights over dp."""
    seconds = _tp_seconds(question, layout, traffic)
    if layout.dp > 1:
        speeds = SPEEDS[question.setup.device]
        seconds += 4 * gradients / (speeds.inside if question.ranks <= question.per_node else speeds.across)
    return seconds


def _tp_seconds(question: Question, layout: Layout, traffic: Collectives) -> float:
    speeds = SPEEDS[question.setup.device]
    speed = speeds.inside if _inside(question, layout.tp) else speeds.across
    return traffic.total * speeds.latency + traffic.total_bytes * (layout.tp - 1) / speed


def _unevenness(question: Question, tp: int) -> float:
    """How much more the fullest rank has to do than the average one."""
    heads = question.config.n_heads
    return -(-heads // tp) * tp / heads


def _inside(question: Question, tp: int) -> bool:
    """Whether every tensor-parallel group lies in one node."""
    return tp <= question.per_node and question.per_node % tp == 0


def _where(tp: int, inside: bool) -> str:
    if tp == 1:
        return "nothing goes between ranks inside a layer"
    return f"tp={tp} stays within a node" if inside else f"tp={tp} crosses nodes: every layer's sums do"


def _reasons(question: Question, layout: Layout, traffic: Collectives) -> Iterator[str]:
    yield _where(layout.tp, _inside(question, layout.tp))
    if layout.tp > 1:
        yield f"{traffic.total} collectives of {traffic.total_bytes / 2**30:.2f} GiB per rank and step"
    yield {
        "none": "nothing is computed twice",
        "selective": "norms and activation functions are computed twice",
        "full": "blocks are computed twice, a third more arithmetic",
    }[layout.recompute]
    if layout.sequence_parallel:
        yield "activations between layers divided by tokens, for more collectives"
    if layout.dp > 1:
        yield f"optimiser state divided over {layout.dp} replicas"
    if _unevenness(question, layout.tp) > 1.001:
        yield f"{question.config.n_heads} heads do not divide by {layout.tp}: uneven work"
