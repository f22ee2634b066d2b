"""An engine in a thread of this process, as its front-end sees it."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from cluster.engine.request import EngineLoad, ModelLimits, Request
from cluster.link.engine_link import EventSink, FaultSink, SampleId
from cluster.link.engine_loop import EngineLoop, EngineSurface, TrainFunction, describe_fault
from cluster.training.train_calls import TrainAnswer, TrainCall
from parallel.errors import WorkerError

log = logging.getLogger(__name__)


class LocalLink:
    """EngineLink over an engine object that from now on belongs to this link's thread."""

    def __init__(self, engine: EngineSurface, training: TrainFunction | None = None) -> None:
        self._engine, self._training = engine, training
        self._loop: EngineLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def limits(self) -> ModelLimits:
        return self._engine.limits

    def start(self, events: EventSink, fault: FaultSink) -> None:
        self._loop = EngineLoop(self._engine, events, training=self._training)
        self._thread = threading.Thread(target=self._run, args=(self._loop, fault), name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        self._started().submit(requests)

    def abort(self, request_ids: Sequence[str], samples: Sequence[SampleId] = ()) -> None:
        self._started().abort(request_ids, samples)

    def train(self, call: TrainCall) -> Future[TrainAnswer]:
        return self._started().train(call)

    def load(self, timeout: float = 5.0, prove: bool = False) -> EngineLoad:
        """Raises WorkerError where the engine does not answer in time."""
        try:
            return self._started().ask_load(prove).result(timeout)
        except TimeoutError as error:
            raise WorkerError(
                f"the engine did not answer within {timeout:g} s; it is in a long step, or its thread has ended"
            ) from error

    def close(self, timeout: float = 10.0) -> None:
        if self._loop is None or self._thread is None:
            return
        self._loop.stop()
        self._thread.join(timeout)
        if self._thread.is_alive():
            log.warning("the engine's thread is still in a step %g s after it was asked to stop", timeout)

    def _started(self) -> EngineLoop:
        if self._loop is None:
            raise WorkerError("the link was not started; call start before submit, abort or load")
        return self._loop

    @staticmethod
    def _run(loop: EngineLoop, fault: FaultSink) -> None:
        try:
            loop.run()
        except Exception as error:
            log.exception("the engine failed")
            fault(describe_fault(error, 0, socket.gethostname()))
