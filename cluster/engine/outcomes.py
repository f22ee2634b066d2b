"""How a step's result changes the sequences, and the events that tell of it.

Here it is decided when a sample ends: a stop token, its length, an abort, a deadline, or a fault of its own row,
which never touches the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.engine.plan import PromptScore, StepPlan, StepResult
from cluster.engine.request import FinishReason, TokenEvent, TokenLogprobs
from cluster.engine.sequence import Sequence

if TYPE_CHECKING:
    from cluster.engine.scheduler import Scheduler


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


class Outcomes:
    """Commits results to a scheduler's sequences and collects events."""

    def __init__(self, scheduler: Scheduler) -> None:
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
            self._scored(score, values)
        for score, values in zip(plan.plain_scores, result.plain_scores, strict=True):
            self._scored(score, values)
        logprobs, errors = result.logprobs, result.errors
        for place, seq in enumerate(plan.sampled):
            if seq.forks:
                self._spread(seq)
            if seq.done:  # its prompt's scores failed a moment ago
                continue
            if errors and place in errors:
                self.end(seq, FinishReason.ERROR, error=errors[place])
            else:
                self._append(seq, result.tokens[place], logprobs[place] if logprobs else None)

    def _append(self, seq: Sequence, token: int, logprob: TokenLogprobs | None) -> None:
        """One new token: the sample goes on, or ends with it."""
        seq.tokens.append(token)
        answer, counters = seq.answer, self._scheduler.counters
        counters.generated_tokens += 1
        if answer.first_token is None:
            answer.first_token = self._scheduler.clock()
        if token in seq.stop_ids:
            shown = answer.request.stopping.include_stop_sequence
            self.end(seq, FinishReason.STOP, token if shown else None, logprob if shown else None, stop_token=token)
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
        """The sample is over: what it held is free, and the event says why."""
        scheduler, answer = self._scheduler, seq.answer
        forks = seq.forks
        scheduler.residents.release(seq)
        scheduler.waiting.discard(seq)
        seq.done, seq.forks = True, []
        del answer.live[seq.index]
        self._events.append(
            TokenEvent(
                request_id=seq.request_id,
                sample_index=seq.index,
                token_ids=() if token is None else (token,),
                logprobs=() if logprob is None else (logprob,),
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
        if not answer.live and scheduler.answers.pop(seq.request_id, None) is not None:
            scheduler.counters.finished_requests += reason is not FinishReason.ABORTED
            scheduler.counters.aborted_requests += reason is FinishReason.ABORTED

    def _inherit(self, seq: Sequence, forks: list[Sequence]) -> None:
        """A sample ended before its prompt was computed: the next one computes it for those that are left."""
        heir = forks[0]
        heir.forks = forks[1:]
        heir.scores = seq.scores and not seq.answer.prompt_sent
        self._scheduler.waiting.push(heir)

    def _spread(self, seq: Sequence) -> None:
        """The prompt is computed: its other samples run on from here, or wait where no block is left to copy into."""
        forks, seq.forks = seq.forks, []
        for fork in forks:
            if not self._scheduler.residents.fork(seq, fork):
                self._scheduler.waiting.push(fork)

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

    def _prompt_logprobs(self, seq: Sequence) -> tuple[TokenLogprobs, ...] | None:
        """All of the prompt's, the first time they are complete."""
        answer = seq.answer
        if answer.prompt_sent or len(answer.prompt_logprobs) < seq.prompt_len - 1:
            return None
        answer.prompt_sent = True
        return tuple(answer.prompt_logprobs)

    def over_already(self, seq: Sequence) -> bool:
        """Ends a sample that has nothing to compute: the score of one token, or a resumed sample that was complete."""
        if seq.answer.request.score_only and seq.prompt_len == 1:
            self.end(seq, FinishReason.STOP)
        elif not seq.answer.request.score_only and len(seq.tokens) >= seq.max_tokens:
            self.end(seq, FinishReason.LENGTH)
        return seq.done
