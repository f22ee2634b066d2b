"""The loop that drives an engine: take what arrived, step, hand on what happened, rest when there is nothing to do.

The one loop for an engine in this process (LocalLink) and for rank 0 of a worker group (EngineServer). Commands may
come from any thread and never wait for a step. What the engine raises in a step ends the loop: a step that failed
half-way has no next.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol

from cluster.engine.request import EngineLoad, ModelLimits, Request, TokenEvent
from cluster.engine.sequences.fault_isolation import GROUP_FAULTS, reason
from cluster.link.engine_link import EventSink, LinkEvent, Rejected, SampleId
from cluster.request_errors import RequestFailed
from cluster.training.train_calls import (
    InParts,
    Kind,
    Later,
    TrainAnswer,
    TrainCall,
    TrainFuture,
    TrainingCancelled,
    TrainingUnavailable,
)
from parallel.errors import CollectiveError, RequestError, TpError, WorkerError

log = logging.getLogger(__name__)

INBOX_SECONDS = 0.005


class EngineSurface(Protocol):
    """What a loop needs of an engine."""

    @property
    def limits(self) -> ModelLimits: ...

    @property
    def idle(self) -> bool: ...

    def submit(self, request: Request) -> object: ...

    def abort(self, request_ids: Sequence[str]) -> None: ...

    def abort_samples(self, samples: Sequence[SampleId]) -> None: ...

    def step(self) -> Sequence[TokenEvent]: ...

    def load(self) -> EngineLoad: ...

    def prove(self) -> EngineLoad:
        """A canary through every rank, then the counters."""
        ...

    def keep_alive(self) -> None:
        """Called while there is nothing to do, so that other ranks know that rank 0 lives."""
        ...


GIVEN_UP = "its client left; the call was given up, and nothing of it was applied"
Outcome = TrainAnswer | Later | InParts
Work = Callable[[], Outcome]
TrainFunction = Callable[[TrainCall], Outcome]
"""What executes training calls beside an engine, in the engine's thread; what is done elsewhere is answered later."""


class EngineLoop:
    """`run` in one thread, the rest from any. Each `idle_seconds` without work the engine is kept alive. Training goes
    on part by part (a micro-batch, say); while there are requests, engine steps get as much time after each as it took.
    """

    def __init__(
        self,
        engine: EngineSurface,
        sink: EventSink,
        idle_seconds: float = 0.5,
        training: TrainFunction | None = None,
    ) -> None:
        self._engine = engine
        self._training = training
        self._train_inbox: deque[tuple[Work, TrainFuture]] = deque()
        self._under_way: tuple[InParts, TrainFuture] | None = None
        self._turn = 0.0  # from when on it is training's again
        self._sink = sink
        self._idle_seconds = idle_seconds
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failure: Exception | None = None
        self._news: list[LinkEvent] = []

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._post(partial(self._submit, (request,)))

    def abort(self, request_ids: Sequence[str], samples: Sequence[SampleId] = ()) -> None:
        self._post(partial(self._abort, tuple(request_ids), tuple(samples)))

    def ask_load(self, prove: bool = False) -> Future[EngineLoad]:
        """The engine's counters as they are between two steps; to `prove`, after a canary through every rank."""
        answer: Future[EngineLoad] = Future()
        self._post(partial(self._answer_load, answer, prove))
        return answer

    def train(self, call: TrainCall) -> TrainFuture:
        """The answer, once the call had its turns between engine steps. Calls run one after the other, but for
        questions of the state.
        """
        answer, work = TrainFuture(), partial(self._execute, call)
        if call.kind is Kind.STATE:
            self._post(partial(self._begin, work, answer))
        else:
            self._post_training(work, answer)
        return answer

    def _post_training(self, work: Work, answer: TrainFuture) -> None:
        with self._wake:
            self._train_inbox.append((work, answer))
            self._wake.notify()

    def stop(self) -> None:
        """End `run` after the step it is in."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def fail(self, error: Exception) -> None:
        """End `run` by raising this: what belongs to the engine has failed beside it."""
        self._failure = error
        self.stop()

    def run(self) -> None:
        """Until `stop`; raises what the engine raises."""
        while True:
            self._drain_inbox()
            if self._failure is not None:
                raise self._failure
            if self._stopping:
                return
            if self._trains and (self._engine.idle or time.monotonic() >= self._turn):
                self._train()
            if not self._engine.idle:
                self._news += self._engine.step()
            if self._news:
                news, self._news = self._news, []
                self._sink(news)
            elif self._engine.idle and not self._trains:
                self._rest()

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _drain_inbox(self) -> None:
        """What arrived; where there is work to go on with, the rest of very much only after the next step."""
        began = time.monotonic()
        while self._inbox:  # append and popleft are atomic; nobody else takes
            self._inbox.popleft()()
            if not self._engine.idle and time.monotonic() - began > INBOX_SECONDS:
                return

    def _rest(self) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._train_inbox or self._stopping, self._idle_seconds)
        self._engine.keep_alive()  # also when woken: questions that come often leave no other time for it

    def _submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            try:
                self._engine.submit(request)
            except RequestError as error:
                self._news.append(Rejected(request.request_id, error))
            except GROUP_FAULTS:
                raise
            except Exception as error:
                log.exception("request %s could not be queued", request.request_id)
                self._news.append(Rejected(request.request_id, RequestFailed(reason(error))))

    def _abort(self, request_ids: Sequence[str], samples: Sequence[SampleId]) -> None:
        if request_ids:
            self._engine.abort(request_ids)
        if samples:
            self._engine.abort_samples(samples)

    def _answer_load(self, answer: Future[EngineLoad], prove: bool) -> None:
        if answer.set_running_or_notify_cancel():
            answer.set_result(self._engine.prove() if prove else self._engine.load())

    @property
    def _trains(self) -> bool:
        return self._under_way is not None or bool(self._train_inbox)

    def _train(self) -> None:
        """One part of the call under way, or the beginning of the next."""
        began = time.monotonic()
        if self._under_way is not None:
            self._go_on(*self._under_way)
        else:
            self._begin(*self._train_inbox.popleft())
        now = time.monotonic()
        self._turn = now + (now - began)

    def _begin(self, work: Work, answer: TrainFuture) -> None:
        if answer.running() and answer.unwanted:  # something long, nothing of which is applied yet
            answer.set_exception(TrainingCancelled(GIVEN_UP))
        elif answer.running() or answer.set_running_or_notify_cancel():
            self._settle(answer, work)

    def _go_on(self, call: InParts, answer: TrainFuture) -> None:
        self._under_way = None
        if answer.unwanted:
            call.cancel()
            answer.set_exception(TrainingCancelled(GIVEN_UP))
        else:
            self._settle(answer, lambda: call.advance() or call)

    def _execute(self, call: TrainCall) -> Outcome:
        if self._training is None:
            raise TrainingUnavailable(
                "this server only generates; start it with --train (training.enabled=true) to let its clients train"
            )
        return self._training(call)

    def _settle(self, answer: TrainFuture, work: Work) -> None:
        """A refusal is the call's own; anything else ends the loop, as in a step."""
        try:
            outcome = work()
        except (CollectiveError, WorkerError) as error:
            answer.set_exception(error)
            raise
        except TpError as error:
            answer.set_exception(error)
        else:
            if isinstance(outcome, Later):
                outcome.done.add_done_callback(partial(self._finish_later, outcome, answer))
            elif isinstance(outcome, InParts):
                self._under_way = outcome, answer
            else:
                answer.set_result(outcome)

    def _finish_later(self, later: Later, answer: TrainFuture, _: object) -> None:
        if later.exclusive:
            self._post_training(later.finish, answer)
        else:
            self._post(partial(self._settle, answer, later.finish))


def describe_fault(error: BaseException, rank: int, node: str) -> str:
    """A fault's message: which rank, which node, why."""
    return f"rank {rank} on {node}: {type(error).__name__}: {error}"
