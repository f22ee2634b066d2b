"""Rank 0's side of a SocketLink: an engine served to one front-end at a time.

A thread accepts, another one reads; the engine's loop runs in the thread that calls `serve` and never waits for the
network. When a front-end goes away its requests are ended and the next one is served. Whoever has not proved the key
within a few seconds is hung up on. What happened in a step has left this process before the next step begins, so that a
front-end knows how far each request was when a step ends this process.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from cluster.engine.request import EngineLoad, Request
from cluster.link import messages
from cluster.link.engine_link import LinkEvent, Rejected
from cluster.link.engine_loop import EngineLoop, EngineSurface, TrainFunction, describe_fault
from cluster.link.wire import Wire, set_limit
from cluster.safe_text import for_terminal
from cluster.supervision import supervised
from cluster.training.train_calls import TrainAnswer, TrainFuture, TrainingCancelled
from parallel.errors import TpError
from parallel.keyed_listener import KeyedListener

log = logging.getLogger(__name__)

JOIN_SECONDS = 5.0
FLUSH_SECONDS = 0.25
"""How long a step waits for the news of the one before to be written; for a front-end that does not read, no more."""
FRONTEND_SILENCE_SECONDS = 30.0  # one that has ended is seen at once; this is for hosts that vanish


class EngineServer:
    """Make it, tell the front-end `address` and the key, then `serve` in the engine's own thread."""

    def __init__(
        self,
        engine: EngineSurface,
        authkey: bytes,
        *,
        host: str = "127.0.0.1",
        training: TrainFunction | None = None,
        prepare: Callable[[Sequence[Request]], None] = lambda requests: None,
    ) -> None:
        """`prepare` does beside the engine's thread what would hold up a step of it."""
        self._limits, self._prepare = engine.limits, prepare
        self._loop = EngineLoop(engine, self._send_events, training=training)
        self._known: queue.SimpleQueue[tuple[socket.socket, str] | None] = queue.SimpleQueue()
        self._listener = KeyedListener(host, 0, authkey, lambda peer, name: self._known.put((peer, name)))
        self._wire: Wire | None = None
        self._open: dict[str, set[int]] = {}  # samples of the present front-end that have not ended
        self._trainings: dict[int, TrainFuture] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._written = threading.Event()
        self._written.set()

    @property
    def address(self) -> tuple[str, int]:
        return self._listener.address

    def serve(self) -> None:
        """Until `stop`, or until the engine fails: the front-end is told the cause, and it is raised here too."""
        supervised("engine-server-listener", self._listener.run, self._loop.fail)
        thread = supervised("engine-server", self._serve_peers, self._loop.fail)
        try:
            self._loop.run()
        except Exception as error:
            self._send(messages.Fault(for_terminal(describe_fault(error, 0, socket.gethostname()))))
            raise
        finally:
            self.stop()
            wire = self._wire
            if wire is not None:
                wire.close()
            self._listener.close()
            self._known.put(None)
            thread.join(JOIN_SECONDS)

    def stop(self) -> None:
        """End `serve` after the step it is in. From any thread."""
        self._stopping.set()
        self._loop.stop()

    # ------------------------------------------------------------ in the front-ends' thread

    def _serve_peers(self) -> None:
        """One front-end after the other."""
        while (known := self._known.get()) is not None:
            self._serve_peer(*known)

    def _serve_peer(self, connection: socket.socket, peer: str) -> None:
        set_limit(connection, FRONTEND_SILENCE_SECONDS)
        wire = Wire(connection, "engine-server")
        wire.send(messages.Hello(self._limits, socket.gethostname()))
        self._wire = wire
        try:
            while not self._stopping.is_set() and not isinstance(message := wire.receive(), messages.Bye):
                self._take(message)
        except (EOFError, OSError) as error:
            if not self._stopping.is_set():
                log.warning("the front-end at %s is gone (%s); its requests are ended", peer, type(error).__name__)
        except Exception:
            log.exception("a message of the front-end at %s could not be taken; its connection is given up", peer)
        finally:
            self._drop(wire)

    def _take(self, message: messages.Message) -> None:
        if isinstance(message, messages.Submit):
            with self._lock:
                for request in message.requests:
                    self._open[request.request_id] = set(range(request.sampling.num_samples)) - set(
                        request.finished_samples
                    )
            self._prepare(message.requests)
            self._loop.submit(message.requests)
        elif isinstance(message, messages.Abort):
            self._loop.abort(message.request_ids, message.samples)
        elif isinstance(message, messages.AskLoad):
            self._loop.ask_load(message.prove).add_done_callback(lambda done: self._answer_load(message.tag, done))
        elif isinstance(message, messages.Train):
            self._trainings[message.tag] = future = self._loop.train(message.call)
            asker = self._wire  # a tag means nothing to the next front-end
            future.add_done_callback(lambda done: self._answer_training(asker, message.tag, done))
        elif isinstance(message, messages.CancelTrain) and (begun := self._trainings.get(message.tag)) is not None:
            begun.cancel()  # one that runs is given up after the part it is in

    def _drop(self, wire: Wire) -> None:
        """The front-end is gone: nobody reads its requests any more."""
        with self._lock:
            self._wire = None
            left, self._open = list(self._open), {}
        self._loop.abort(left)
        for begun in list(self._trainings.values()):
            begun.cancel()
        wire.close()
        self._await_ends()

    def _await_ends(self) -> None:
        """Until the engine has ended what was left: the next front-end may give requests of the same names, and must
        not take the old ones' ends for theirs."""
        for _ in range(2):  # the first answer follows the order to end them, the second what was told of that
            answer = self._loop.ask_load()
            while not (answer.done() or self._stopping.wait(0.01)):
                continue

    # ------------------------------------------------------------ in the engine's thread

    def _send_events(self, events: Sequence[LinkEvent]) -> None:
        with self._lock:
            for event in events:
                self._note_end(event)
        wire = self._wire
        if wire is not None and not wire.send_now(messages.Events(events)) and self._written.is_set():
            self._written = wire.flush()  # where that one is not set the front-end does not read: no step waits for it
            self._written.wait(FLUSH_SECONDS)

    def _note_end(self, event: LinkEvent) -> None:
        if isinstance(event, Rejected):
            self._open.pop(event.request_id, None)
        elif event.finish_reason is not None:
            samples = self._open.get(event.request_id)
            if samples is not None:
                samples.discard(event.sample_index)
                if not samples:
                    del self._open[event.request_id]

    def _answer_load(self, tag: int, done: Future[EngineLoad]) -> None:
        if done.exception() is None:
            self._send(messages.LoadAnswer(tag, done.result()))

    def _answer_training(self, asker: Wire | None, tag: int, done: Future[TrainAnswer]) -> None:
        self._trainings.pop(tag, None)
        if asker is None:
            return
        error = TrainingCancelled("cancelled before its turn") if done.cancelled() else done.exception()
        if error is None:
            asker.send(messages.Trained(tag, done.result()))
        elif isinstance(error, TpError):
            asker.send(messages.TrainingRefused(tag, error))

    def _send(self, message: messages.Message) -> None:
        wire = self._wire
        if wire is not None:
            wire.send(message)
