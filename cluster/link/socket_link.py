"""An engine on rank 0 of a worker group, as its front-end sees it: EngineLink over one authenticated TCP connection.

Its thread reads events; writing is queued, so nothing here waits for the network in the event loop. A peer that dies,
hangs up, stays silent for SILENCE_SECONDS or says what cannot be understood is a fault, reported once: the reading
thread never ends without that.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

from msgspec import MsgspecError

from cluster.engine.request import EngineLoad, ModelLimits, Request
from cluster.link import messages
from cluster.link.engine_link import EventSink, FaultSink, SampleId
from cluster.link.wire import SILENCE_SECONDS, Wire, connect, set_limit
from cluster.training.train_calls import TrainAnswer, TrainCall
from parallel.errors import WorkerError

log = logging.getLogger(__name__)


class SocketLink:
    """Connects at once (within `timeout`), so that `limits` is known; events flow from `start` on."""

    def __init__(self, address: tuple[str, int], authkey: bytes, timeout: float = 10.0) -> None:
        self._where = f"{address[0]}:{address[1]}"
        peer = connect(address, authkey, timeout)
        self._wire = Wire(peer, "engine-link")
        hello = self._greeting(timeout)
        set_limit(peer, SILENCE_SECONDS)
        self._limits, self._node = hello.limits, hello.node
        self._closing = False
        self._tags = itertools.count()
        self._loads: dict[int, Future[EngineLoad]] = {}
        self._trainings: dict[int, _Asked] = {}
        self._reader: threading.Thread | None = None

    @property
    def limits(self) -> ModelLimits:
        return self._limits

    def start(self, events: EventSink, fault: FaultSink) -> None:
        self._reader = threading.Thread(target=self._read, args=(events, fault), name="engine-link-reader", daemon=True)
        self._reader.start()

    def submit(self, requests: Sequence[Request]) -> None:
        self._wire.send(messages.Submit(tuple(requests)))

    def abort(self, request_ids: Sequence[str], samples: Sequence[SampleId] = ()) -> None:
        self._wire.send(messages.Abort(tuple(request_ids), tuple(samples)))

    def train(self, call: TrainCall) -> Future[TrainAnswer]:
        """Of a connection that is lost before the answer, the fault is the answer."""
        tag = next(self._tags)
        self._trainings[tag] = answer = _Asked(partial(self._wire.send, messages.CancelTrain(tag)))
        answer.add_done_callback(lambda done: self._trainings.pop(tag, None))
        self._wire.send(messages.Train(tag, call))
        return answer

    def load(self, timeout: float = 5.0, prove: bool = False) -> EngineLoad:
        """Raises WorkerError where the engine does not answer in time."""
        tag, answer = next(self._tags), Future[EngineLoad]()
        self._loads[tag] = answer
        self._wire.send(messages.AskLoad(tag, prove))
        try:
            return answer.result(timeout)
        except TimeoutError as error:
            raise WorkerError(f"the engine at {self._where} did not answer within {timeout:g} s") from error
        finally:
            self._loads.pop(tag, None)

    def close(self, timeout: float = 10.0) -> None:
        self._closing = True
        self._wire.send(messages.Bye())
        self._wire.close(timeout / 2)
        if self._reader is not None:
            self._reader.join(timeout / 2)

    def _greeting(self, timeout: float) -> messages.Hello:
        try:
            hello = self._wire.receive()
            if isinstance(hello, messages.Hello):
                return hello
            text = f"the engine at {self._where} began with {type(hello).__name__}: another version runs there"
            raise WorkerError(text)
        except (EOFError, OSError) as error:
            text = f"the engine at {self._where} said nothing within {timeout:g} s ({type(error).__name__})"
            raise WorkerError(text) from error
        except (MsgspecError, ValueError) as error:
            text = f"the engine at {self._where} began with what is no message ({error}): another version runs there"
            raise WorkerError(text) from error

    def _read(self, events: EventSink, fault: FaultSink) -> None:
        cause = self._read_until_lost(events)
        for answer in list(self._loads.values()):  # nobody will answer these
            if not answer.done():
                answer.set_exception(WorkerError(cause))
        try:
            if not self._closing:
                fault(cause)
        finally:
            self._wire.close()

    def _read_until_lost(self, events: EventSink) -> str:
        try:
            while True:
                message = self._wire.receive()
                if isinstance(message, messages.Fault):
                    return message.cause
                self._take(message, events)
        except BlockingIOError:
            return f"rank 0 on {self._node}: no sign of life from {self._where} for {SILENCE_SECONDS:g} s"
        except (EOFError, OSError) as error:
            lost = f"the connection to {self._where} was lost ({type(error).__name__})"
            return f"rank 0 on {self._node}: {lost}: its process has ended"
        except Exception as error:
            log.exception("the engine's messages could not be taken")
            return f"rank 0 on {self._node}: a message from {self._where} could not be taken ({error!r})"

    def _take(self, message: messages.Message, events: EventSink) -> None:
        if isinstance(message, messages.Events):
            events(message.events)
        elif isinstance(message, messages.LoadAnswer):
            answer = self._loads.get(message.tag)
            if answer is not None and not answer.done():
                answer.set_result(message.load)
        elif isinstance(message, messages.Trained | messages.TrainingRefused):
            trained = self._trainings.get(message.tag)
            if trained is None or not trained.set_running_or_notify_cancel():
                return
            if isinstance(message, messages.Trained):
                trained.set_result(message.answer)
            else:
                trained.set_exception(message.error)


class _Asked(Future[TrainAnswer]):
    """Cancelled, it still waits for the answer: whether the call was applied is known where it is run."""

    def __init__(self, ask: Callable[[], None]) -> None:
        super().__init__()
        self._ask = ask

    def cancel(self) -> bool:
        if not self.done():
            self._ask()
        return False
