"""How a step's result changes the sequences, and the events that tell of it.

Here it is decided when a sample ends: a stop token, a grammar after whose text nothing may follow, its length, an
abort, a deadline, or a fault of its own row, which never touches the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from msgspec.structs import replace

from cluster.engine.beams.beam_search import Hypothesis, Row
from cluster.engine.kv_cache.beam_tables import BeamTables
from cluster.engine.kv_cache.kv_cache_manager import KVCacheManager
from cluster.engine.request import FinishReason, TokenEvent, TokenLogprobs
from cluster.engine.sample.pooling import Rows
from cluster.engine.schedule.fair_share import FairQueue
from cluster.engine.schedule.step_plan import PromptScore, StepPlan, StepResult
from cluster.engine.sequences.ahead import Ahead
from cluster.engine.sequences.fault_isolation import GROUP_FAULTS, reason
from cluster.engine.sequences.sequence import Answer, BeamGroup, Sequence
from cluster.engine.speculate.speculator import Speculator

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """What the engine has done so far."""

    preemptions: int = 0
    steps: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    finished_requests: int = 0
    aborted_requests: int = 0
    weight_version: int = 0
    drafts: int = 0  # sequences' steps with one
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    guided_requests: int = 0


class Scheduling(Protocol):
    """What of a scheduler a result changes."""

    counters: Counters
    clock: Callable[[], float]
    residents: KVCacheManager
    queue: FairQueue
    tables: BeamTables
    beams: dict[str, BeamGroup]  # by request
    speculator: Speculator

    def advance(self, seq: Sequence, count: int) -> None:
        """So many more of its tokens are in the cache."""
        ...

    def forget(self, answer: Answer) -> bool:
        """Nothing of it is left; False where that is known already."""
        ...


class OutputProcessor:
    """Commits results to a scheduler's sequences and collects events."""

    def __init__(self, scheduler: Scheduling) -> None:
        self._scheduler = scheduler
        self._events: list[TokenEvent] = []

    @property
    def pending(self) -> bool:
        return bool(self._events)

    def take(self) -> list[TokenEvent]:
        events, self._events = self._events, []
        return events

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        self._scheduler.counters.weight_version = result.weight_version
        for score, values in zip(plan.gathered_scores, result.gathered_scores, strict=True):
            self._alone(score.sequence, self._scored, score, values)
        for score, values in zip(plan.plain_scores, result.plain_scores, strict=True):
            self._alone(score.sequence, self._scored, score, values)
        for run, value in zip(plan.pools, result.pools, strict=True):
            self._alone(run.sequence, self._pooled, run.sequence, value)
        logprobs, errors, accepted = result.logprobs, result.errors, dict.fromkeys(plan.drafted, 0)
        for place, seq in enumerate(plan.sampled):
            if isinstance(seq, Ahead):
                if not seq.came_true:
                    continue
                seq = seq.of  # whose last token is in the cache already, and this is the next
                accepted[seq] += 1
                self._scheduler.advance(seq, 1)
            try:
                if seq.forks:
                    self._spread(seq)
                if seq.done:  # its prompt's scores failed a moment ago
                    continue
                if errors and place in errors:
                    self.end(seq, FinishReason.ERROR, error=errors[place])
                else:
                    self._append(seq, result.tokens[place], logprobs[place] if logprobs else None)
            except GROUP_FAULTS:
                raise
            except Exception as error:  # noqa: BLE001 (this request's own)
                self.fail(seq, error)
        if plan.beams:
            self._advance_beams(plan, result)
        for seq, count in accepted.items():
            self._settle(seq, plan.drafted[seq], count)

    def _settle(self, seq: Sequence, drafted: int, accepted: int) -> None:
        """How a sequence's draft fared."""
        counters = self._scheduler.counters
        counters.drafts += 1
        counters.draft_tokens += drafted
        counters.accepted_draft_tokens += accepted
        self._scheduler.speculator.settle(seq, drafted, accepted)

    def _alone(self, seq: Sequence, act: Callable[..., None], *arguments: object) -> None:
        """What it raises ends the sequence's request alone."""
        try:
            act(*arguments)
        except GROUP_FAULTS:
            raise
        except Exception as error:  # noqa: BLE001 (this request's own)
            self.fail(seq, error)

    def fail(self, seq: Sequence, error: Exception) -> None:
        """Ends all of a request's samples, of which something raised an exception."""
        log.error("request %s failed by itself", seq.request_id, exc_info=error)
        for sample in list(seq.answer.live.values()):
            sample.forks = []
            self.end(sample, FinishReason.ERROR, error=reason(error))

    def _advance_beams(self, plan: StepPlan, result: StepResult) -> None:
        """One token more for every beam of each search that was computed."""
        rows = dict(zip(plan.beams, result.beams, strict=True))
        for group in {id(seq.beam): seq.beam for seq in plan.beams}.values():
            if group is None or group.leader.done:
                continue
            self._alone(group.leader, self._take_rows, group, rows)

    def _take_rows(self, group: BeamGroup, rows: Mapping[Sequence, Row | str]) -> None:
        found = [rows[seq] for seq in group.reading]
        wrong = next((row for row in found if isinstance(row, str)), None)
        if wrong is None:
            self._advance(group, [row for row in found if not isinstance(row, str)])
        else:
            self.end(group.leader, FinishReason.ERROR, error=wrong)

    def _advance(self, group: BeamGroup, rows: list[Row]) -> None:
        answer, counters = group.leader.answer, self._scheduler.counters
        counters.generated_tokens += len(rows)
        if answer.first_token is None:
            answer.first_token = self._scheduler.clock()
        group.advance(rows)
        if not group.search.done:
            return
        found, wanted = group.search.results(), answer.request.sampling.n
        if len(found) >= wanted:
            self._end_beams(group, [self._finished(group, place, made) for place, made in enumerate(found[:wanted])])
            return
        self.end(
            group.leader,
            FinishReason.ERROR,
            error=f"the beam search found {len(found)} sequences and sampling.n is {wanted}: no others may be "
            "generated; lower n, or forbid less",
        )

    def _finished(self, group: BeamGroup, place: int, made: Hypothesis) -> TokenEvent:
        """One of the sequences that were found."""
        stopping, tokens = group.leader.answer.request.stopping, made.beam.tokens
        shown = len(tokens) - (made.stopped and not stopping.include_stop_sequence)
        hidden = made.beam.logprobs[shown:]
        return TokenEvent(
            request_id=group.leader.request_id,
            sample_index=place,
            token_ids=tuple(tokens[:shown]),
            logprobs=tuple(made.beam.logprobs[:shown]),
            finish_reason=FinishReason.STOP if made.stopped else FinishReason.LENGTH,
            stop_token_id=tokens[-1] if made.stopped else None,
            stop_logprob=hidden[0].logprob if hidden else None,
            score=made.score,
        )

    def _end_beams(self, group: BeamGroup, events: list[TokenEvent]) -> None:
        """The search is over, and all of its sequences with it: one event for each."""
        scheduler, leader = self._scheduler, group.leader
        answer, reason = leader.answer, events[0].finish_reason
        scheduler.tables.release(group)
        scheduler.queue.discard(leader)
        for seq in group.sequences:
            seq.done = True
        answer.live.clear()
        prompt_logprobs = self._prompt_logprobs(leader) if leader.scores else None
        timings, version = answer.timings(scheduler.clock()), scheduler.counters.weight_version
        self._events.append(
            replace(events[0], prompt_logprobs=prompt_logprobs, timings=timings, weight_version=version)
        )
        self._events += [replace(event, timings=timings, weight_version=version) for event in events[1:]]
        scheduler.beams.pop(leader.request_id, None)
        self._close(answer, reason)

    def _close(self, answer: Answer, reason: FinishReason | None) -> None:
        """Counts the request once nothing of it is left."""
        counters = self._scheduler.counters
        if not answer.live and self._scheduler.forget(answer):
            counters.finished_requests += reason is not FinishReason.ABORTED
            counters.aborted_requests += reason is FinishReason.ABORTED

    def _append(self, seq: Sequence, token: int, logprob: TokenLogprobs | None) -> None:
        """One new token: the sample goes on, or ends with it."""
        seq.tokens.append(token)
        answer, counters = seq.answer, self._scheduler.counters
        counters.generated_tokens += 1
        if answer.first_token is None:
            answer.first_token = self._scheduler.clock()
        if token in seq.stop_ids:
            shown = answer.request.stopping.include_stop_sequence
            self.end(seq, FinishReason.STOP, token if shown else None, logprob, stop_token=token)
        elif seq.guide is not None and seq.guide.ended(seq.tokens):
            self.end(seq, FinishReason.STOP, token, logprob)
        elif len(seq.tokens) >= seq.max_tokens:
            self.end(seq, FinishReason.LENGTH, token, logprob)
        else:
            self._events.append(
                TokenEvent(
                    request_id=seq.request_id,
                    sample_index=seq.index,
                    token_ids=(token,),
                    logprobs=() if logprob is None else (logprob,),
                    prompt_logprobs=self._prompt_logprobs(seq) if seq.scores else None,
                    weight_version=counters.weight_version,
                )
            )

    def end(
        self,
        seq: Sequence,
        reason: FinishReason,
        token: int | None = None,
        logprob: TokenLogprobs | None = None,
        *,
        stop_token: int | None = None,
        error: str | None = None,
    ) -> None:
        """The sample is over: what it held is free, and the event says why. Beams end together."""
        scheduler, answer = self._scheduler, seq.answer
        if seq.beam is not None:
            indices = range(answer.request.sampling.n)
            events = [
                TokenEvent(request_id=seq.request_id, sample_index=i, finish_reason=reason, error=error)
                for i in indices
            ]
            self._end_beams(seq.beam, events)
            return
        forks = seq.forks
        scheduler.residents.release(seq)
        scheduler.queue.discard(seq)
        scheduler.speculator.ended(seq)
        seq.done, seq.forks = True, []
        del answer.live[seq.index]
        self._events.append(
            TokenEvent(
                request_id=seq.request_id,
                sample_index=seq.index,
                token_ids=() if token is None else (token,),
                logprobs=() if logprob is None or token is None else (logprob,),
                stop_logprob=logprob.logprob if logprob is not None and token is None else None,
                prompt_logprobs=self._prompt_logprobs(seq) if seq.scores else None,
                finish_reason=reason,
                stop_token_id=stop_token,
                error=error,
                weight_version=scheduler.counters.weight_version,
                timings=answer.timings(scheduler.clock()),
            )
        )
        if forks:
            self._inherit(seq, forks)
        self._close(answer, reason)

    def _inherit(self, seq: Sequence, forks: list[Sequence]) -> None:
        """A sample ended before its prompt was computed: the next one computes it for those that are left."""
        heir = forks[0]
        heir.forks = forks[1:]
        heir.scores = seq.scores and not seq.answer.prompt_sent
        self._scheduler.queue.push(heir)

    def _spread(self, seq: Sequence) -> None:
        """The prompt is computed: its other samples run on from here, or wait where no block is left to copy into."""
        forks, seq.forks = seq.forks, []
        for fork in forks:
            if not self._scheduler.residents.fork(seq, fork):
                self._scheduler.queue.push(fork)

    def _scored(self, score: PromptScore, values: list[TokenLogprobs] | str) -> None:
        """Log-probabilities of some of the prompt's tokens; for a request that is only scored, perhaps its end."""
        seq = score.sequence
        if isinstance(values, str):
            for sample in list(seq.answer.live.values()):
                sample.forks = []
                self.end(sample, FinishReason.ERROR, error=values)
            return
        seq.answer.prompt_logprobs += values
        if seq.answer.request.score_only and len(seq.answer.prompt_logprobs) == seq.prompt_len - 1:
            self.end(seq, FinishReason.STOP)

    def _pooled(self, seq: Sequence, value: Rows | str | None) -> None:
        """A prompt that was only read: its end, once all of its rows are there."""
        if isinstance(value, str):
            self.end(seq, FinishReason.ERROR, error=value)
        elif value is not None:
            self.end(seq, FinishReason.STOP)
            self._events[-1] = replace(self._events[-1], pooled=value)

    def _prompt_logprobs(self, seq: Sequence) -> tuple[TokenLogprobs, ...] | None:
        """All of the prompt's, the first time they are complete."""
        answer = seq.answer
        if answer.prompt_sent or len(answer.prompt_logprobs) < seq.prompt_len - 1:
            return None
        answer.prompt_sent = True
        return tuple(answer.prompt_logprobs)

    def over_already(self, seq: Sequence) -> bool:
        """Ends a sample that has nothing to compute: the score of one token, or a resumed sample that was complete."""
        if (seq.answer.request.score_only and seq.prompt_len == 1) or (
            seq.guide is not None and len(seq.tokens) > seq.prompt_len and seq.guide.ended(seq.tokens)
        ):
            self.end(seq, FinishReason.STOP)
        elif seq.answer.request.continues and len(seq.tokens) >= seq.max_tokens:
            self.end(seq, FinishReason.LENGTH)
        return seq.done
