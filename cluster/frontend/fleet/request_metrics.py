"""What a front-end measures of the requests and training calls that pass through it: plain numbers, no metric library.

Latencies are as a client could see them at best: from admission to when a token is handed to its stream. Whoever
wants them asks in the front-end's event loop; how they are shown is decided elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from cluster.engine.request import FinishReason
from cluster.frontend.fleet.open_requests import Entry
from cluster.frontend.output.streams import Chunk
from cluster.training.train_calls import TrainAnswer, TrainCall
from parallel.errors import TpError

FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_TOKENS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
WHOLE = (0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0)


class Histogram:
    """How often values fell up to each bound, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last: above all bounds
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass
class TrainingMetrics:
    """Of the training calls that were answered: totals, and the last step's numbers."""

    step: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    tokens: int = 0
    forward_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    collective_seconds: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)

    def note(self, call: TrainCall, answer: TrainAnswer) -> None:
        if answer.replayed:
            return
        self.calls[call.kind.value] += 1
        self.step = answer.step
        self.forward_seconds += answer.forward_seconds
        self.optimizer_seconds += answer.optimizer_seconds
        self.collective_seconds += answer.collective_seconds
        if call.kind.takes_sequences and call.kind.value != "Evaluate":
            self.loss, self.tokens = answer.loss, self.tokens + answer.tokens
        if call.kind.applies_step:
            self.grad_norm, self.learning_rate = answer.grad_norm, answer.learning_rate


class RequestMetrics:
    """Everything that is measured."""

    def __init__(self) -> None:
        self.first_token = Histogram(FIRST_TOKEN)
        self.between_tokens = Histogram(BETWEEN_TOKENS)
        self.queued = Histogram(WHOLE)
        self.whole = Histogram(WHOLE)
        self.finished: Counter[str] = Counter()  # samples, by reason
        self.failed: Counter[str] = Counter()  # prompts, by error
        self.delivered_tokens = 0
        self.train = TrainingMetrics()

    def took(self, entry: Entry, chunk: Chunk, now: float) -> None:
        """News of a sample on its way to the reader."""
        count = len(chunk.token_ids)
        if count:
            sample = entry.samples[chunk.sample_index]
            if sample.last is not None:
                self.between_tokens.observe((now - sample.last) / count, count)
            elif entry.first_token == now:
                self.first_token.observe(now - entry.admitted)
            sample.last = now
            self.delivered_tokens += count
        if chunk.finish_reason is not None:
            self.ended(chunk.finish_reason)

    def ended(self, reason: FinishReason) -> None:
        self.finished[reason.value] += 1

    def failed_with(self, error: TpError) -> None:
        self.failed[type(error).__name__] += 1

    def over(self, entry: Entry, now: float) -> None:
        """Nothing of the prompt is open any more."""
        self.whole.observe(now - entry.admitted)
        if entry.queued is not None:
            self.queued.observe(entry.queued)
