"""Training calls at the front-end: what is refused before any rank sees it, and who waits for an answer.

The same rules as for prompts: every field that breaks a rule is named. Which step a call belongs to is decided on rank
0, in the order in which calls reach it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256

from cluster.engine.request import ModelLimits
from cluster.frontend.fleet.request_metrics import TrainingMetrics
from cluster.frontend.fleet.suspect_trials import SuspectTrials
from cluster.frontend.requests.call import FrontendConfig
from cluster.frontend.requests.content_hash import ContentKeys
from cluster.frontend.requests.field_ranges import FIELDS
from cluster.frontend.requests.quarantine import Quarantine, Suspicion
from cluster.frontend.training.label_rules import known_losses, task_violations
from cluster.frontend.training.loss_fields import unread
from cluster.frontend.training.weight_state import WeightState
from cluster.link.engine_link import EngineLink
from cluster.request_errors import InvalidRequest, Violation
from cluster.training.train_calls import (
    CROSS_ENTROPY,
    DPO,
    IGNORED_LABEL,
    IMPORTANCE_SAMPLING,
    PPO,
    TASK,
    Kind,
    TrainAnswer,
    TrainCall,
    TrainSequence,
    name_rule,
)
from parallel.errors import TpError

log = logging.getLogger(__name__)

NEEDS: Mapping[str, tuple[str, ...]] = {
    CROSS_ENTROPY: (),
    IMPORTANCE_SAMPLING: ("old_logprobs", "advantages"),
    PPO: ("old_logprobs", "advantages"),
    DPO: ("reference_logprobs",),
}
PER_TOKEN = ("loss_weights", "old_logprobs", "advantages", "reference_logprobs")


@dataclass(eq=False)
class TrainSuspect:
    """A training call as far as it can be suspected of an engine's end."""

    call: TrainCall
    suspicion: Suspicion | None = None
    unfinished: Sequence[int] = (0,)
    begun: bool = False

    def content_key(self, keys: ContentKeys | None = None) -> bytes:
        """Of what it does, whatever its key and step."""
        what = replace(self.call, idempotency_key="", expected_step=None, expected_incarnation=None)
        return sha256(repr(what).encode()).digest()


class TrainRequests:
    """Calls under way to the engine; all of them end when it does. `weights` is what they have done so far."""

    def __init__(
        self,
        meters: TrainingMetrics | None = None,
        quarantine: Quarantine | None = None,
        trials: SuspectTrials | None = None,
    ) -> None:
        self.weights = WeightState()
        self._meters = meters or TrainingMetrics()
        self._engine = 0  # how many there were before
        self._quarantine, self._trials = quarantine or Quarantine(), trials
        self._waiting: dict[asyncio.Future[TrainAnswer], TrainSuspect] = {}  # in the order of their turns
        self.quiet = asyncio.Event()
        """Set while no call is under way."""
        self.quiet.set()

    async def train(self, link: EngineLink, call: TrainCall) -> TrainAnswer:
        """Cancelled before its turn, the call is never run."""
        self.weights.check(call)
        suspect = TrainSuspect(call)
        if (refusal := self._quarantine.refusal(lambda: [suspect.content_key()])) is not None:
            raise refusal
        self._quarantine.suspect(suspect, lambda: [suspect.content_key()])
        if suspect.suspicion is not None and self._trials is not None:
            async with self._trials.alone():
                return await self._run(link, call, suspect)
        return await self._run(link, call, suspect)

    async def _run(self, link: EngineLink, call: TrainCall, suspect: TrainSuspect) -> TrainAnswer:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[TrainAnswer] = loop.create_future()
        self._waiting[answer] = suspect
        self.quiet.clear()
        source = link.train(call)
        source.add_done_callback(partial(_hand_over, loop, partial(self._settle, call, answer, self._engine)))
        try:
            return await answer
        finally:
            source.cancel()  # of no effect once it runs
            self._waiting.pop(answer, None)
            if not self._waiting:
                self.quiet.set()

    def fail(self, error: TpError) -> None:
        """The engine is gone, or nobody waits for it any longer: whether the calls were applied is not known."""
        self._engine += 1
        for answer in [answer for answer in self._waiting if not answer.done()]:
            answer.set_exception(error)

    @property
    def running(self) -> list[TrainSuspect]:
        """The call whose turn it is, where it computes anything."""
        first = [suspect for answer, suspect in self._waiting.items() if not answer.done()][:1]
        return [suspect for suspect in first if suspect.call.kind is not Kind.STATE]

    def quarantined(self) -> None:
        """The call whose turn it is is not run again."""
        for answer, suspect in [each for each in self._waiting.items() if not each[0].done()][:1]:
            error = self._quarantine.convict(suspect)
            log.error("training call %s: %s", suspect.call.kind.value, error)
            answer.set_exception(error)

    def _settle(
        self, call: TrainCall, answer: asyncio.Future[TrainAnswer], engine: int, source: Future[TrainAnswer]
    ) -> None:
        error = source.exception()
        if error is None and engine == self._engine:  # also where its caller has left
            self.weights.note(call, source.result())
            self._meters.note(call, source.result())
        if error is None and (suspect := self._waiting.get(answer)) is not None:
            self._quarantine.clear(suspect)  # it came to its end
        if answer.done():
            return
        if error is None:
            answer.set_result(source.result())
        else:
            answer.set_exception(error)


def _hand_over(
    loop: asyncio.AbstractEventLoop, settle: Callable[[Future[TrainAnswer]], None], source: Future[TrainAnswer]
) -> None:
    """Runs in the engine's or the link's thread. What comes after the loop has closed has no reader."""
    if not source.cancelled():
        try:
            loop.call_soon_threadsafe(settle, source)
        except RuntimeError:
            log.debug("dropped the answer to a training call: the event loop is closed")


def with_loss(call: TrainCall, limits: ModelLimits) -> TrainCall:
    """With the loss that is meant where none is named: the head's, or language's."""
    usual = CROSS_ENTROPY if limits.task is None else TASK
    return call if call.loss or not call.kind.takes_sequences else replace(call, loss=usual)


def check(call: TrainCall, limits: ModelLimits, config: FrontendConfig) -> None:
    """Raises InvalidRequest with every field that breaks a rule."""
    violations = [Violation(field, rule) for field, rule in _violations(call, limits, config)]
    if violations:
        raise InvalidRequest.of(violations)


def _violations(call: TrainCall, limits: ModelLimits, config: FrontendConfig) -> Iterator[tuple[str, str]]:
    yield from _retries(call, config)
    yield from _numbers(call)
    rule = name_rule(call.name) if call.kind.takes_name else None
    if rule is not None:
        yield "name", rule
    if not call.kind.takes_sequences:
        return
    known = known_losses(limits.task)
    if call.loss not in known:
        yield "loss", f"{call.loss!r} is unknown; choose one of {known}"
    if not call.sequences:
        yield "sequences", "none given; give at least one"
    if call.loss == DPO and len(call.sequences) % 2:
        yield "sequences", f"{len(call.sequences)} given; dpo takes pairs, chosen then rejected"
    tokens = sum(len(sequence.token_ids) for sequence in call.sequences)
    if tokens > config.max_train_tokens:
        yield "sequences", f"{tokens} tokens; a call takes at most {config.max_train_tokens}"
        return
    if call.loss not in known:
        return
    yield from unread(call, limits.task)
    if call.loss == TASK and limits.task is not None:
        yield from task_violations(call, limits.task, limits)
        return
    for index, sequence in enumerate(call.sequences):
        for field, rule in _sequence(sequence, call.loss, limits):
            yield f"sequences[{index}].{field}", rule
    if call.sequences and not any(any(sequence.weights) for sequence in call.sequences):
        yield "sequences", "every loss weight is 0 or every label -100; nothing would be learned"


def _retries(call: TrainCall, config: FrontendConfig) -> Iterator[tuple[str, str]]:
    if len(call.idempotency_key) > config.max_request_id:
        yield "idempotency_key", f"{len(call.idempotency_key)} characters; at most {config.max_request_id}"
    if len(call.session) > config.max_request_id:
        yield "session", f"{len(call.session)} characters; at most {config.max_request_id}"
    if call.idempotency_key or call.kind in (Kind.EVALUATE, Kind.STATE, Kind.DROP) or call.kind.writes:
        return  # a name that was written is refused when it is given again
    if call.kind is Kind.FORWARD_BACKWARD:
        yield "idempotency_key", "missing; without it a repeated call would add its gradients twice"
    elif call.expected_step is None:
        yield "expected_step", "missing; give it or an idempotency_key, so that no step is applied twice"


def _numbers(call: TrainCall) -> Iterator[tuple[str, str]]:
    groups = (("optimizer", "OptimizerOptions", call.optimizer), ("loss_options", "LossOptions", call.loss_options))
    for prefix, message, given in groups:
        for name, value in given.items():
            if problem := FIELDS[message][name].problem(value):
                yield f"{prefix}.{name}", problem
    if call.normaliser is not None and (problem := FIELDS["TrainStepRequest"]["normaliser"].problem(call.normaliser)):
        yield "normaliser", problem


def _sequence(sequence: TrainSequence, loss: str, limits: ModelLimits) -> Iterator[tuple[str, str]]:
    length = len(sequence.token_ids)
    if not 2 <= length <= limits.max_context:
        yield "token_ids", f"{length} tokens; give 2 to {limits.max_context}"
        return
    bad = next((i for i, token in enumerate(sequence.token_ids) if not 0 <= token < limits.vocab_size), None)
    if bad is not None:
        yield f"token_ids[{bad}]", f"{sequence.token_ids[bad]} is not a token; ids are 0 to {limits.vocab_size - 1}"
    yield from _labels(sequence, limits)
    for name in PER_TOKEN:
        values: tuple[float, ...] = getattr(sequence, name)
        if not values and name in NEEDS.get(loss, ()):
            yield name, f"missing; the loss {loss!r} needs it"
        elif values and len(values) != length - 1:
            yield name, f"{len(values)} numbers for {length} tokens; give {length - 1}, one per token after the first"
        wrong = FIELDS["TrainSequence"][name].problem_at(values)
        if wrong is not None:
            yield f"{name}[{wrong[0]}]", wrong[1]


def _labels(sequence: TrainSequence, limits: ModelLimits) -> Iterator[tuple[str, str]]:
    labels, length = sequence.labels, len(sequence.token_ids)
    if labels and len(labels) != length:
        yield "labels", f"{len(labels)} labels for {length} tokens; give {length}, one per token as in transformers"
    wrong = next((i for i, x in enumerate(labels) if x != IGNORED_LABEL and not 0 <= x < limits.vocab_size), None)
    if wrong is not None:
        yield f"labels[{wrong}]", f"{labels[wrong]} is neither a token (0 to {limits.vocab_size - 1}) nor -100"
