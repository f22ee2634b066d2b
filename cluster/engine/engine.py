"""The engine: a scheduler, and an executor that runs its plans. Plain Python, one process or one rank of many.

Not thread-safe on purpose: one thread submits, aborts and steps. Who drives it (a front-end's thread, a worker's
loop, a test) decides when. A fault inside a step is the executor's group's end and is raised; what concerns one
request only ends that one, as an event.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from cluster.engine.beams.best_of import best_places, mean_logprob
from cluster.engine.engine_config import EngineConfig
from cluster.engine.guided.guides import Guides
from cluster.engine.kv_cache.block_pool import BlockPool
from cluster.engine.request import EngineLoad, FinishReason, ModelLimits, Request, TokenEvent, TokenLogprobs
from cluster.engine.schedule.scheduler import Scheduler
from cluster.engine.schedule.step_plan import StepPlan, StepResult
from cluster.engine.traced_requests import Traced
from parallel.errors import RequestError

if TYPE_CHECKING:
    from cluster.engine.run.canary import Canary


class Executor(Protocol):
    """Runs plans, on this rank and on all others."""

    def execute(self, plan: StepPlan) -> StepResult: ...

    def keep_alive(self) -> None:
        """Called often while there is nothing to execute."""
        ...

    def close(self) -> None: ...


@dataclass
class StepSeconds:
    """Where the time of steps went; the rest of step_seconds is telling the ranks and making the model's inputs. And
    how many of them were replayed.
    """

    step_seconds: float = 0.0
    schedule_seconds: float = 0.0
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0
    commit_seconds: float = 0.0
    replayed_steps: int = 0

    def add(self, started: float, scheduled: float, executed: float, committed: float, result: StepResult) -> None:
        self.step_seconds += committed - started
        self.schedule_seconds += scheduled - started
        self.forward_seconds += result.forward_seconds
        self.sample_seconds += result.sample_seconds
        self.commit_seconds += committed - executed
        self.replayed_steps += result.replayed


class Engine:
    """Requests in, token events out, one step at a time."""

    def __init__(
        self,
        executor: Executor,
        limits: ModelLimits,
        config: EngineConfig,
        num_blocks: int,
        clock: Callable[[], float] = time.monotonic,
        canary: Canary | None = None,
        guides: Guides | None = None,
    ) -> None:
        capacity = num_blocks * config.block_size
        self.limits = replace(
            limits, kv_capacity_tokens=capacity, max_batch=config.max_sequences, block_size=config.block_size
        )
        self.config, self.executor, self.canary = config, executor, canary
        self.scheduler = Scheduler(config, self.limits, BlockPool(num_blocks, config.block_size), clock, guides)
        self._seconds = StepSeconds()
        self._traced = Traced()

    @property
    def idle(self) -> bool:
        """Nothing to compute and nothing to tell: the driver may wait for work, calling `keep_alive` meanwhile."""
        return self.scheduler.idle

    def submit(self, request: Request) -> Request:
        """Queues a request; returns it with seed and max_new_tokens decided. Raises RequestError or CapacityError."""
        submitted = self.scheduler.submit(request)
        self._traced.add(submitted)
        return submitted

    def prepare(self, requests: Iterable[Request]) -> None:
        """Compiles what they bring that takes time, from any thread: to submit them then takes none. What is wrong with
        one is said when it is submitted.
        """
        for guide in {request.sampling.guide for request in requests if request.sampling.guide is not None}:
            with suppress(RequestError):
                self.scheduler.guides.compiled(guide)

    def abort(self, request_ids: Many[str]) -> None:
        """Ends requests; their blocks are free before the next step."""
        self.scheduler.abort(request_ids)

    def abort_samples(self, samples: Many[tuple[str, int]]) -> None:
        """Ends single samples (request_id, sample_index): a stop string was found, say."""
        self.scheduler.abort_samples(samples)

    def step(self) -> list[TokenEvent]:
        """One step of everything that runs; what happened, aborts and deadlines included."""
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan is None:
            self.executor.keep_alive()
            return self.scheduler.take_events()
        scheduled = time.perf_counter()
        result = self.executor.execute(plan)
        executed = time.perf_counter()
        self.scheduler.took(plan, executed - scheduled)
        events = self.scheduler.commit(plan, result)
        committed = time.perf_counter()
        self._seconds.add(started, scheduled, executed, committed, result)
        if self._traced:
            return [*self._traced.reports(plan, result, committed - started, self.scheduler.answers), *events]
        return events

    def keep_alive(self) -> None:
        """To be called at least every second while idle: the other ranks give up on a silent rank 0."""
        self.executor.keep_alive()

    def weights_changed(self) -> None:
        """After an update of the model's weights: every running sequence is computed again with the new ones."""
        self.scheduler.forget_cache()

    def load(self) -> EngineLoad:
        """A snapshot of the counters; seconds are totals."""
        load = replace(self.scheduler.load(), **vars(self._seconds))
        if self.canary is None:
            return load
        return replace(
            load, canaries=self.canary.count, canary_fault=self.canary.fault, ranks=self.canary.reports,
            collectives=self.canary.traffic(), collective_seconds=self.canary.waits(),
        )  # fmt: skip

    def prove(self) -> EngineLoad:
        """A canary through every rank, between two steps; the counters, with what it found."""
        if self.canary is not None:
            self.canary.sing()
        return self.load()

    def close(self) -> None:
        self.executor.close()


@dataclass
class Result:
    """One sample's whole answer."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    weight_version: int = 0
    score: float | None = None
    stop_logprob: float | None = None
    pooled: tuple[tuple[float, ...], ...] | None = None

    def add(self, event: TokenEvent) -> None:
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.pooled = event.pooled or self.pooled
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        self.finish_reason, self.stop_token_id, self.error = event.finish_reason, event.stop_token_id, event.error
        self.weight_version, self.score, self.stop_logprob = event.weight_version, event.score, event.stop_logprob


def generate(engine: Engine, requests: Iterable[Request]) -> list[list[Result]]:
    """Runs requests to their end: for each its samples' results. For tests and programs without a front-end."""
    submitted = [engine.submit(request) for request in requests]
    results = {request.request_id: [Result() for _ in range(request.sampling.num_samples)] for request in submitted}
    while not engine.idle:
        for event in engine.step():
            if event.request_id in results:
                results[event.request_id][event.sample_index].add(event)
    return [_best(results[request.request_id], request) for request in submitted]


def _best(results: list[Result], request: Request) -> list[Result]:
    """With best_of: the n whose tokens, the one that stopped them included, have the highest mean log-probability."""
    if request.sampling.best_of is None:
        return results
    for result in results:
        result.score = mean_logprob([entry.logprob for entry in result.logprobs], result.stop_logprob)
    return [results[place] for place in best_places([r.score for r in results], request.sampling.n)]
