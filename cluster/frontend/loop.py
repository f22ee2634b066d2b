"""The loop that drives an engine: take what arrived, step, hand on what happened, rest when there is nothing to do.

The one loop for an engine in this process (LocalLink) and for rank 0 of a worker group (EngineServer). Commands may
come from any thread and never wait for a step. What the engine raises in a step ends the loop: a step that failed
half-way has no next.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol

from cluster.engine.request import EngineLoad, ModelLimits, Request, TokenEvent
from cluster.frontend.link import EventSink, LinkEvent, Rejected, SampleId
from cluster.training.calls import Later, TrainAnswer, TrainCall, TrainingUnavailable
from parallel.errors import CollectiveError, RequestError, TpError, WorkerError


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


TrainFunction = Callable[[TrainCall], TrainAnswer | Later]
"""What executes training calls beside an engine, in the engine's thread; what is done elsewhere is answered later."""


class EngineLoop:
    """`run` in one thread, the rest from any. Each `idle_seconds` without work the engine is kept alive. Between two
    engine steps at most one training call runs, so that neither waits long for the other.
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
        self._train_inbox: deque[tuple[TrainCall, Future[TrainAnswer]]] = deque()
        self._sink = sink
        self._idle_seconds = idle_seconds
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._news: list[LinkEvent] = []

    def submit(self, requests: Sequence[Request]) -> None:
        self._post(partial(self._submit, tuple(requests)))

    def abort(self, request_ids: Sequence[str], samples: Sequence[SampleId] = ()) -> None:
        self._post(partial(self._abort, tuple(request_ids), tuple(samples)))

    def ask_load(self, prove: bool = False) -> Future[EngineLoad]:
        """The engine's counters as they are between two steps; to `prove`, after a canary through every rank."""
        answer: Future[EngineLoad] = Future()
        self._post(partial(self._answer_load, answer, prove))
        return answer

    def train(self, call: TrainCall) -> Future[TrainAnswer]:
        """The answer, once the call had its turn between two engine steps."""
        answer: Future[TrainAnswer] = Future()
        with self._wake:
            self._train_inbox.append((call, answer))
            self._wake.notify()
        return answer

    def stop(self) -> None:
        """End `run` after the step it is in."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def run(self) -> None:
        """Until `stop`; raises what the engine raises."""
        while True:
            self._drain_inbox()
            if self._stopping:
                return
            if self._train_inbox:
                self._train(*self._train_inbox.popleft())
            if not self._engine.idle:
                self._news += self._engine.step()
            if self._news:
                news, self._news = self._news, []
                self._sink(news)
            elif self._engine.idle and not self._train_inbox:
                self._rest()

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _drain_inbox(self) -> None:
        while self._inbox:  # append and popleft are atomic; nobody else takes
            self._inbox.popleft()()

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

    def _abort(self, request_ids: Sequence[str], samples: Sequence[SampleId]) -> None:
        if request_ids:
            self._engine.abort(request_ids)
        if samples:
            self._engine.abort_samples(samples)

    def _answer_load(self, answer: Future[EngineLoad], prove: bool) -> None:
        if answer.set_running_or_notify_cancel():
            answer.set_result(self._engine.prove() if prove else self._engine.load())

    def _train(self, call: TrainCall, answer: Future[TrainAnswer]) -> None:
        if answer.set_running_or_notify_cancel():
            self._settle(answer, partial(self._execute, call))

    def _execute(self, call: TrainCall) -> TrainAnswer | Later:
        if self._training is None:
            raise TrainingUnavailable(
                "this server only generates; start it with --train (training.enabled=true) to let its clients train"
            )
        return self._training(call)

    def _settle(self, answer: Future[TrainAnswer], work: Callable[[], TrainAnswer | Later]) -> None:
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
                finish = outcome.finish
                outcome.done.add_done_callback(lambda _: self._post(partial(self._settle, answer, finish)))
            else:
                answer.set_result(outcome)


def describe_fault(error: BaseException, rank: int, node: str) -> str:
    """A fault's message: which rank, which node, why."""
    return f"rank {rank} on {node}: {type(error).__name__}: {error}"
