"""Prometheus metrics of a server: the numbers of engine and front-end under their public names.

The one module that knows the metric library. Nothing is measured here: each scrape asks the front-end's loop once,
which asks the engines between two steps. What an engine counts carries its replica's number; while a replica has no
engine its last numbers stay, and its `engine_answers` is 0.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from operator import attrgetter
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.engine.request import EngineLoad
from cluster.frontend.fleet.fleet import Fleet
from cluster.frontend.fleet.request_metrics import Histogram, RequestMetrics, TrainingMetrics
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.readiness import Readiness
from parallel.errors import TpError

log = logging.getLogger(__name__)
PREFIX = "tp_decoders_"
Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)
ANSWER_S = 4.0
"""How long a scrape waits for the engine; Prometheus gives up after 10 seconds."""

ENGINE_GAUGES = {
    "running": ("requests_running", "Sequences in the batch."),
    "waiting": ("requests_waiting", "Sequences that wait for a place in the batch."),
    "kv_blocks_total": ("kv_blocks", "Blocks of the key/value cache."),
    "kv_blocks_free": ("kv_blocks_free", "Blocks that no sequence holds."),
    "kv_blocks_cached": ("kv_blocks_cached", "Free blocks that still hold the start of some sequence."),
    "weight_version": ("weight_version", "Version of the weights that the last step used."),
}
ENGINE_COUNTERS = {
    "steps": ("steps", "Steps of the engine."),
    "replayed_steps": ("replayed_steps", "Of these, steps that ran as a recorded program."),
    "preemptions": ("preemptions", "Sequences that gave their blocks back to be computed again."),
    "generated_tokens": ("generated_tokens", "Tokens that the engine generated."),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts that the engine began."),
    "finished_requests": ("engine_requests_finished", "Requests that the engine ended by itself."),
    "aborted_requests": ("engine_requests_aborted", "Requests that were ended from outside."),
    "prefix_tokens_looked_up": ("prefix_tokens_looked_up", "Tokens looked up in the cache of prefixes."),
    "prefix_tokens_reused": ("prefix_tokens_reused", "Of these, tokens found there."),
    "drafts": ("spec_decode_drafts", "Drafts of a sequence's next tokens that were tried."),
    "draft_tokens": ("spec_decode_draft_tokens", "Tokens of these drafts."),
    "accepted_draft_tokens": ("spec_decode_accepted_tokens", "Of these, came true: each saved its sequence a step."),
    "guided_requests": ("guided_requests", "Requests whose answers follow a grammar."),
    "guide_compiles": ("guide_compiles", "Grammars compiled, which were not among the last ones."),
    "guide_compile_seconds": ("guide_compile_seconds", "Time that took."),
    "guide_masks": ("guide_masks", "Masks of the tokens that a grammar allows, one for each row."),
    "guide_mask_seconds": ("guide_mask_seconds", "Time that took, in steps, with following the tokens."),
    "canaries": ("canaries", "Canaries that came back from every rank."),
}
STEP_PARTS = ("schedule", "forward", "sample", "commit")
HISTOGRAMS = {
    "first_token": ("time_to_first_token_seconds", "From admission to the first token."),
    "between_tokens": ("inter_token_seconds", "Between two tokens of a sample."),
    "queued": ("queue_seconds", "From admission to a place in the batch."),
    "whole": ("request_seconds", "From admission to the end of a prompt."),
}
TRAIN_GAUGES = {
    "step": ("training_step", "Optimiser steps applied to the weights that serve."),
    "loss": ("training_loss", "Loss of the last batch."),
    "grad_norm": ("training_grad_norm", "Norm of the gradient at the last step."),
    "learning_rate": ("training_learning_rate", "Learning rate of the last step."),
}


class ServeMetrics(Collector):
    """What a registry asks at each scrape, in a thread of its own; `info` are labels that never change."""

    def __init__(
        self,
        frontend: Frontend,
        readiness: Readiness,
        loop: asyncio.AbstractEventLoop,
        info: Mapping[str, str] | None = None,
    ) -> None:
        self._frontend, self._readiness, self._loop = frontend, readiness, loop
        self._info = dict(info or {})
        self._last = {replica.index: EngineLoad() for replica in frontend.fleet.replicas}

    def collect(self) -> Iterable[Metric]:
        """In the scrape's thread; the numbers are taken in the front-end's loop."""
        taken = asyncio.run_coroutine_threadsafe(self.take(), self._loop)
        try:
            return taken.result(ANSWER_S + 2.0)
        except (TimeoutError, CancelledError):
            log.warning("a scrape of the metrics was not answered: the server is busy or stopping")
            return []

    def describe(self) -> Iterable[Metric]:
        return []  # nothing is collected merely to be registered

    async def take(self) -> list[Metric]:
        """All families, of one moment."""
        answered = await self._ask()
        return [
            *self._server(),
            *replica_metrics(self._frontend.fleet, answered),
            *engine_metrics(self._last),
            *request_metrics(self._frontend.meters),
            *training_metrics(self._frontend.meters.train),
        ]

    async def _ask(self) -> set[int]:
        """Which replicas' engines gave their numbers; of the others the last ones stay."""
        try:
            answers = {seat.replica: load for seat, load in (await self._frontend.loads(ANSWER_S)).items()}
        except TpError:  # no replica has an engine
            return set()
        given = {index: load for index, load in answers.items() if isinstance(load, EngineLoad)}
        self._last |= given
        return set(given)

    def _server(self) -> Iterator[Metric]:
        frontend = self._frontend
        info = gauge("info", "What is served; always 1.", labels=list(self._info))
        info.add_metric(list(self._info.values()), 1)
        state = gauge("state", "1 for the state that the server is in.", labels=["state"])
        for each in State:
            state.add_metric([each.value], each is frontend.state)
        yield from (info, state)
        yield gauge("ready", "Whether the last canary went through every rank of some replica.", self._readiness.ready)
        yield gauge("requests_open", "Prompts in the journal: waiting, running or paused.", frontend.num_open)
        yield counter("canary_failures", "Canaries that failed or found a fault.", self._readiness.failures)
        total = frontend.quarantine.total
        yield counter("quarantined", "Requests that are not run again: engines died while they were running.", total)
        if (ledger := frontend.ledger) is not None:
            yield counter("ledger_failures", "Writes to the state folder that failed.", ledger.folder.failures)
            writer = ledger.writer
            yield gauge("ledger_behind_seconds", "How old its oldest write is that waits.", writer.behind_seconds)
            yield gauge("ledger_behind_bytes", "What waits to be written to it.", writer.behind_bytes)


def replica_metrics(fleet: Fleet, answered: Container[int]) -> Iterator[Metric]:
    """What the front-end knows of each replica."""
    replica = ["replica"]
    ready = gauge("replica_ready", "Whether its last canary went through every rank.", labels=replica)
    answers = gauge("engine_answers", "Whether the engine gave its numbers for this scrape.", labels=replica)
    tokens = gauge("outstanding_tokens", "Of prompts open there, and all that may be written to them.", labels=replica)
    words = "How often another engine, or a new connection to it, took over."
    restarts = counter("restarts", words, labels=replica)
    words = "Prompts by why they went there: their beginning was known, or there was the least to do."
    routed = counter("prompts_routed", words, labels=[*replica, "by"])
    for each, sent in zip(fleet.replicas, fleet.router.sent, strict=True):
        label = str(each.index)
        ready.add_metric([label], each.seat is not None and not each.doubt)
        answers.add_metric([label], each.index in answered)
        tokens.add_metric([label], each.seat.tokens if each.seat else 0)
        restarts.add_metric([label], each.restarts)
        routed.add_metric([label, "prefix"], sent.by_prefix)
        routed.add_metric([label, "load"], sent.by_load)
    yield from (ready, answers, tokens, restarts, routed)


def engine_metrics(loads: Mapping[int, EngineLoad]) -> Iterator[Metric]:
    """What each replica's engine counts."""
    replica = ["replica"]
    for field, (name, words) in ENGINE_GAUGES.items():
        yield _each(gauge(name, words, labels=replica), loads, attrgetter(field))
    for field, (name, words) in ENGINE_COUNTERS.items():
        yield _each(counter(name, words, labels=replica), loads, attrgetter(field))
    used = gauge("kv_usage_ratio", "Part of the cache's blocks that sequences hold.", labels=replica)
    yield _each(used, loads, _usage)
    words, labels = "Time of steps, by part; other: telling the ranks, inputs.", ["replica", "part"]
    seconds = counter("step_seconds", words, labels=labels)
    for index, load in loads.items():
        parts = {part: getattr(load, f"{part}_seconds") for part in STEP_PARTS}
        for part, value in (parts | {"other": max(0.0, load.step_seconds - sum(parts.values()))}).items():
            seconds.add_metric([str(index), part], value)
    yield seconds
    yield from _collectives(loads)
    yield from _ranks(loads)


def _usage(load: EngineLoad) -> float:
    return 1.0 - load.kv_blocks_free / load.kv_blocks_total if load.kv_blocks_total else 0.0


def _each(family: Family, loads: Mapping[int, EngineLoad], value: Callable[[EngineLoad], float]) -> Family:
    for index, load in loads.items():
        family.add_metric([str(index)], value(load))
    return family


def _collectives(loads: Mapping[int, EngineLoad]) -> Iterator[Metric]:
    labels = ["replica", "kind"]
    count = counter("collectives", "Collectives that rank 0 issued, by kind.", labels=labels)
    size = counter("collective_bytes", "Bytes that rank 0 gave to collectives, by kind.", labels=labels)
    words = "Time of rank 0 in collectives, by kind, waiting for peers included."
    seconds = counter("collective_seconds", words, labels=labels)
    for index, load in loads.items():
        for kind, (number, nbytes) in load.collectives.items():
            count.add_metric([str(index), kind], number)
            size.add_metric([str(index), kind], nbytes)
        for kind, time in load.collective_seconds.items():
            seconds.add_metric([str(index), kind], time)
    yield from (count, size, seconds)


def _ranks(loads: Mapping[int, EngineLoad]) -> Iterator[Metric]:
    labels = ["replica", "rank", "node"]
    words = "Time of each rank in collectives, as of the last canary; not waiting for commands."
    waits = counter("rank_collective_seconds", words, labels=labels)
    memory = gauge("rank_memory_bytes", "Memory of each rank, as of the last canary.", labels=[*labels, "kind"])
    for index, load in loads.items():
        for rank in load.ranks:
            where = [str(index), str(rank.rank), rank.node]
            waits.add_metric(where, rank.collective_seconds)
            memory.add_metric([*where, "host"], rank.memory_bytes)
            memory.add_metric([*where, "device"], rank.device_memory_bytes)
    yield from (waits, memory)


def request_metrics(meters: RequestMetrics) -> Iterator[Metric]:
    for field, (name, words) in HISTOGRAMS.items():
        yield histogram(name, words, getattr(meters, field))
    finished = counter("samples_finished", "Samples that ended, by reason.", labels=["reason"])
    for reason, number in meters.finished.items():
        finished.add_metric([reason], number)
    failed = counter("prompts_failed", "Prompts that ended with an error, by kind.", labels=["error"])
    for error, number in meters.failed.items():
        failed.add_metric([error], number)
    yield from (finished, failed)
    yield counter("delivered_tokens", "Tokens handed to streams.", meters.delivered_tokens)


def training_metrics(train: TrainingMetrics) -> Iterator[Metric]:
    for field, (name, words) in TRAIN_GAUGES.items():
        yield gauge(name, words, getattr(train, field))
    calls = counter("training_calls", "Training calls that were answered, by kind.", labels=["kind"])
    for kind, number in train.calls.items():
        calls.add_metric([kind], number)
    seconds = counter("training_seconds", "Time of training calls, by part.", labels=["part"])
    seconds.add_metric(["forward_backward"], train.forward_seconds)
    seconds.add_metric(["optimizer"], train.optimizer_seconds)
    yield from (calls, seconds)
    words = "Part of these that rank 0 was in collectives, waiting for peers included."
    yield counter("training_collective_seconds", words, train.collective_seconds)
    yield counter("training_tokens", "Tokens that were trained on.", train.tokens)


def gauge(name: str, words: str, value: float | None = None, labels: list[str] | None = None) -> GaugeMetricFamily:
    value = None if value is None else float(value)
    return GaugeMetricFamily(PREFIX + name, words, value=value, labels=labels)


def counter(name: str, words: str, value: float | None = None, labels: list[str] | None = None) -> CounterMetricFamily:
    """The library adds `_total` to the name."""
    value = None if value is None else float(value)
    return CounterMetricFamily(PREFIX + name, words, value=value, labels=labels)


def histogram(name: str, words: str, values: Histogram) -> HistogramMetricFamily:
    buckets, below = [], 0
    for bound, count in zip((*values.bounds, float("inf")), values.counts, strict=True):
        below += count
        buckets.append(("+Inf" if bound == float("inf") else repr(bound), below))
    return HistogramMetricFamily(PREFIX + name, words, buckets=buckets, sum_value=values.total)
