"""Which tokens are computed next: continuous batching over a pool of cache blocks.

What a step takes is step_planner.py's choice, what callers have of it fair_share.py's. Of all that runs one sequence
can always go on, so every admitted request ends. No tensor, no clock of its own.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from collections.abc import Sequence as Many

from cluster.engine.beams.beam_search import search_of
from cluster.engine.engine_config import EngineConfig
from cluster.engine.guided.guides import Guides
from cluster.engine.kv_cache.block_pool import BlockPool
from cluster.engine.kv_cache.kv_cache_manager import KVCacheManager
from cluster.engine.request import EngineLoad, FinishReason, ModelLimits, Request, TokenEvent
from cluster.engine.request_validation import resolve, validate
from cluster.engine.schedule.fair_share import FairQueue
from cluster.engine.schedule.output_processor import Counters, OutputProcessor
from cluster.engine.schedule.step_plan import PlanBuilder, StepPlan, StepResult
from cluster.engine.schedule.step_planner import Planner
from cluster.engine.schedule.step_time import StepTime
from cluster.engine.sequences.fault_isolation import RequestFault, blamed_on
from cluster.engine.sequences.sequence import Answer, BeamGroup, Sequence
from cluster.engine.sequences.waiting_queue import Order
from cluster.engine.speculate.speculator import Speculator
from parallel.errors import QueueFull, RequestError


class Scheduler:
    """Submit and abort at any time between steps; then schedule, execute the plan, commit its result."""

    def __init__(
        self, config: EngineConfig, limits: ModelLimits, pool: BlockPool, clock: Callable[[], float] = time.monotonic,
        guides: Guides | None = None,
    ) -> None:  # fmt: skip
        self.config, self.limits, self.clock = config, limits, clock
        self.guides = guides or Guides(lambda: None)
        self.residents = KVCacheManager(pool, config.max_sequences, config.prefix_caching, config.guest_slots)
        self.queue = FairQueue(config.max_step_tokens, clock)
        self.beams: dict[str, BeamGroup] = {}  # by request
        self.answers: dict[str, Answer] = {}
        self.counters = Counters()
        self.pace = StepTime(config.share_stretch, config.max_step_tokens, clock)
        self.planner = Planner(config, self.residents, self.queue, self.counters, self.pace, self._started)
        self.tables = self.planner.tables
        self.speculator = Speculator(config, self.residents, limits.vocab_size)
        self._remembers = config.prefix_caching
        self._outcomes = OutputProcessor(self)
        self._deadlines: list[tuple[float, int, str]] = []
        self._submissions = 0

    @property
    def idle(self) -> bool:
        """Nothing runs, waits, or is still to be told."""
        return not self.answers and not self._outcomes.pending

    def submit(self, request: Request) -> Request:
        """Queues a request and returns it with everything it left open decided; refuses what cannot work."""
        validate(request, self.limits)
        if request.request_id in self.answers:
            raise RequestError(
                f"request_id {request.request_id!r} is in use by a request that has not ended; choose another"
            )
        if len(self.queue) >= self.config.max_queue:
            raise QueueFull(
                f"{len(self.queue)} sequences are waiting and engine.max_queue is {self.config.max_queue}; try later"
            )
        request = resolve(request, self.limits)
        if request.sampling.guide is not None and request.continues:
            self.guides.compiled(request.sampling.guide)  # refused here, before anything is changed
            self.counters.guided_requests += 1
        now = self.clock()
        deadline = None if request.deadline is None else now + request.deadline
        answer = Answer(request, self.queue.join(request.share), now, deadline)
        self._submissions += 1
        if answer.deadline is not None:
            self._limit(answer.deadline, request.request_id)
        self._enqueue(answer)
        return request

    def _limit(self, deadline: float, request_id: str) -> None:
        """The deadlines of requests that have ended go as soon as they are the most."""
        heapq.heappush(self._deadlines, (deadline, self._submissions, request_id))
        if len(self._deadlines) > 64 and len(self._deadlines) > 2 * (len(self.answers) + 1):
            self._deadlines = sorted(entry for entry in self._deadlines if entry[2] in self.answers)
            heapq.heappush(self._deadlines, (deadline, self._submissions, request_id))

    def _enqueue(self, answer: Answer) -> None:
        request = answer.request
        when = answer.submitted + request.priority * self.config.priority_patience
        ignored = frozenset() if request.stopping.ignore_eos else frozenset(self.limits.eos_token_ids)
        stop_ids = ignored | frozenset(request.stopping.stop_token_ids)
        count = request.sampling.num_samples if request.continues else 1
        indices = [i for i in range(count) if i not in request.finished_samples]
        if indices and request.sampling.beam is not None:
            self._enqueue_beams(answer, when, stop_ids)
            return
        samples = []
        for index in indices:
            order: Order = (when, self._submissions, index)
            samples.append(self._guided(Sequence(answer, index, order, stop_ids)))
        self.answers[request.request_id] = answer
        answer.live = {seq.index: seq for seq in samples}
        if samples:
            samples[0].scores = request.score_only or request.response.prompt_logprobs is not None
        for seq in [s for s in samples if self._outcomes.over_already(s)]:
            samples.remove(seq)
        self._share_prompt(samples)
        if not answer.live:
            self.forget(answer)

    def _guided(self, seq: Sequence) -> Sequence:
        """With a matcher of its own where the request has a grammar."""
        if seq.sampling.guide is not None and seq.answer.request.continues:
            seq.guide = self.guides.matcher(seq.sampling.guide, seq.prompt_len)
        return seq

    def forget(self, answer: Answer) -> bool:
        """Nothing of it is left; False where that is known already."""
        if self.answers.pop(answer.request.request_id, None) is None:
            return False
        self.queue.leave(answer.flow)
        return True

    def _enqueue_beams(self, answer: Answer, when: float, stop_ids: frozenset[int]) -> None:
        """One place in the queue; the sequences of a beam search come and go together."""
        request = answer.request
        width = request.sampling.beam.width if request.sampling.beam is not None else 1
        orders = [(when, self._submissions, index) for index in range(width)]
        beams = [self._guided(Sequence(answer, index, order, stop_ids)) for index, order in enumerate(orders)]
        beams[0].scores = request.response.prompt_logprobs is not None
        self.answers[request.request_id] = answer
        self.beams[request.request_id] = BeamGroup(beams, search_of(request, self.limits))
        answer.live = {0: beams[0]}
        self.queue.push(beams[0])

    def _share_prompt(self, samples: list[Sequence]) -> None:
        """Samples of a bare prompt fork from the first once it is computed; resumed ones go by themselves."""
        if samples and not any(len(seq.tokens) > seq.prompt_len for seq in samples):
            samples[0].forks = samples[1:]
            samples = samples[:1]
        for seq in samples:
            self.queue.push(seq)

    def abort(self, request_ids: Many[str]) -> None:
        """Ends requests; their blocks are free at once. Unknown ids (already ended) are no error."""
        for request_id in request_ids:
            self._end_request(request_id, FinishReason.ABORTED)

    def abort_samples(self, samples: Many[tuple[str, int]]) -> None:
        """Ends single samples, (request_id, sample_index) each."""
        for request_id, index in samples:
            answer = self.answers.get(request_id)
            if answer is None or index not in answer.live:
                continue
            seq = answer.live[index]
            for parent in answer.live.values():
                if seq in parent.forks:
                    parent.forks.remove(seq)
            self._outcomes.end(seq, FinishReason.ABORTED)

    def _end_request(self, request_id: str, reason: FinishReason) -> None:
        answer = self.answers.get(request_id)
        for seq in list(answer.live.values()) if answer is not None else []:
            seq.forks = []
            self._outcomes.end(seq, reason)

    def _expire(self) -> None:
        now = self.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, _, request_id = heapq.heappop(self._deadlines)
            answer = self.answers.get(request_id)
            if answer is not None and answer.deadline == deadline:
                self._end_request(request_id, FinishReason.DEADLINE)

    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is nothing to compute; `take_events` then still has news."""
        if self._deadlines:
            self._expire()
        self.counters.steps += 1
        while True:
            try:
                plan = self._plan()
                break
            except RequestFault as fault:  # its request ends, and the rest is planned without it
                self._outcomes.fail(fault.sequence, fault.cause)
        if not plan.sequences:
            self.counters.steps -= 1
            return None
        return plan.plan(*self.residents.take_changes())

    def _plan(self) -> PlanBuilder:
        for group in [*self.beams.values()]:
            with blamed_on(group.leader):
                self.tables.settle(group)
        plan = PlanBuilder(self.counters.steps)
        chosen = self.planner.choose()
        drafts = self.speculator.drafts(chosen)
        for seq, count in chosen.items():
            with blamed_on(seq):
                if seq in drafts:
                    plan.add_drafted(seq, drafts[seq])
                else:
                    plan.add(seq, count)
            seq.last_step = plan.number
        return plan

    def forget_cache(self) -> None:
        """The weights have changed: what runs is computed again with the new ones, and nothing old is shared."""
        while self.residents.running:
            self.planner.set_aside(self.residents.running[-1])
        self.residents.pool.forget()

    def _started(self, seq: Sequence) -> None:
        if seq.answer.started is None:
            seq.answer.started = self.clock()
            self.counters.prompt_tokens += seq.prompt_len

    def took(self, plan: StepPlan, seconds: float) -> None:
        """How long the ranks were at a step."""
        rows = plan.query_lens.count(1) + len(plan.drafted) + sum(plan.drafted.values())
        self.pace.took(rows, len(plan.tokens) - rows, seconds)

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Takes in what the step computed; returns everything that happened since the last call."""
        for seq, count in zip(plan.sequences, plan.query_lens, strict=True):
            self.advance(seq, count - plan.drafted.get(seq, 0))
        self._outcomes.commit(plan, result)
        return self._outcomes.take()

    def advance(self, seq: Sequence, count: int) -> None:
        """So many more of its tokens are in the cache; what is there of a draft that was wrong is written over."""
        self.queue.charge(seq, seq.computed, seq.computed + count)
        seq.computed += count
        if self._remembers and not seq.done and seq.computed >= (seq.chained + 1) * self.residents.pool.block_size:
            self.residents.remember(seq)

    def take_events(self) -> list[TokenEvent]:
        """What happened outside of any step: aborts, deadlines, requests that were over before they began."""
        return self._outcomes.take()

    def load(self) -> EngineLoad:
        pool, counters = self.residents.pool, self.counters
        return EngineLoad(
            running=len(self.residents.running),
            waiting=len(self.queue),
            kv_blocks_total=pool.num_blocks,
            kv_blocks_free=pool.num_free,
            kv_blocks_cached=pool.num_remembered,
            preemptions=counters.preemptions,
            steps=counters.steps,
            generated_tokens=counters.generated_tokens,
            prompt_tokens=counters.prompt_tokens,
            finished_requests=counters.finished_requests,
            aborted_requests=counters.aborted_requests,
            weight_version=counters.weight_version,
            prefix_tokens_looked_up=self.residents.looked_up,
            prefix_tokens_reused=self.residents.reused,
            drafts=counters.drafts,
            draft_tokens=counters.draft_tokens,
            accepted_draft_tokens=counters.accepted_draft_tokens,
            guided_requests=counters.guided_requests,
            guide_compiles=self.guides.compiles,
            guide_compile_seconds=self.guides.seconds,
            guide_masks=self.guides.masks.masks,
            guide_mask_seconds=self.guides.masks.seconds,
        )
