"""Messages between a front-end and rank 0, over one authenticated TCP connection with a limit on every wait.

multiprocessing.connection does framing and the challenge that proves both sides know the key; only after that is
anything unpickled. Both sides send a `Beat` each second, so silence means a dead, stopped or unreachable peer. The
limits are the socket's own (SO_RCVTIMEO, SO_SNDTIMEO): a read or write that takes longer raises.
"""

from __future__ import annotations

import logging
import pickle
import queue
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from cluster.engine.request import EngineLoad, ModelLimits, Request
from cluster.link.engine_link import LinkEvent, SampleId
from cluster.training.train_calls import TrainAnswer, TrainCall
from parallel.errors import TpError, WorkerError

log = logging.getLogger(__name__)
BEAT_SECONDS = 1.0
SILENCE_SECONDS = 8.0
MAX_MESSAGE_BYTES = 1 << 30


@dataclass(frozen=True)
class Hello:
    """Server to client, once, after the challenge."""

    limits: ModelLimits
    node: str


@dataclass(frozen=True)
class Submit:
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Abort:
    request_ids: tuple[str, ...]
    samples: tuple[SampleId, ...] = ()


@dataclass(frozen=True)
class AskLoad:
    tag: int
    prove: bool = False


@dataclass(frozen=True)
class LoadAnswer:
    tag: int
    load: EngineLoad


@dataclass(frozen=True)
class Train:
    tag: int
    call: TrainCall


@dataclass(frozen=True)
class CancelTrain:
    tag: int


@dataclass(frozen=True)
class Trained:
    tag: int
    answer: TrainAnswer | TpError


@dataclass(frozen=True)
class Events:
    events: Sequence[LinkEvent]


@dataclass(frozen=True)
class Fault:
    cause: str


@dataclass(frozen=True)
class Beat:
    """I am alive."""


@dataclass(frozen=True)
class Bye:
    """I close on purpose."""


Message = Hello | Submit | Abort | AskLoad | LoadAnswer | Train | CancelTrain | Trained | Events | Fault | Beat | Bye


class Wire:
    """One connection. `send` only queues; a thread writes, and beats while there is nothing to write. `send_now` writes
    in the caller's thread, as far as that takes no waiting. One thread may `receive`.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._socket = socket.socket(fileno=socket.dup(connection.fileno()))
        self._outbox: queue.SimpleQueue[Message | bytes | threading.Event | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0  # queued or being written by the thread; `send_now` may not overtake it
        self._closed = threading.Event()
        self._writer = threading.Thread(target=self._write, name=f"{name}-writer", daemon=True)
        self._writer.start()

    def send(self, message: Message) -> None:
        """Returns at once; what is sent on a closed wire is dropped."""
        if not self._closed.is_set():
            self._queue(message)

    def send_now(self, message: Message) -> bool:
        """As `send`, but whether it has left this process; it has where the peer reads and nothing else waits."""
        if self._waiting:
            self.send(message)
            return False
        rest = _framed(message)
        with self._lock:
            try:
                if not self._waiting and not self._closed.is_set():
                    rest = rest[self._socket.send(rest, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                pass
            except OSError:
                return False  # the reader finds the same and reports it
            if rest and not self._closed.is_set():
                self._waiting += 1
                self._outbox.put(rest)
        return not rest

    def flush(self) -> threading.Event:
        """Set once all that was sent so far has left this process, or the wire is closed."""
        written = threading.Event()
        self._queue(written)
        if self._closed.is_set():
            written.set()
        return written

    def _queue(self, item: Message | threading.Event | None) -> None:
        with self._lock:
            self._waiting += 1
            self._outbox.put(item)

    def receive(self) -> Message:
        """The next message that says something. Raises EOFError or OSError when the peer is gone or silent."""
        while True:
            # the peer has proved that it has the key
            message = pickle.loads(self._connection.recv_bytes(MAX_MESSAGE_BYTES))
            if not isinstance(message, Beat):
                return message

    def close(self, timeout: float = 2.0) -> None:
        """Write what is queued, then let go; wakes a thread in `receive`."""
        self._queue(None)
        if threading.current_thread() is not self._writer:
            self._writer.join(timeout)
        self._hang_up()

    def _write(self) -> None:
        try:
            while (item := self._next()) is not None:
                if isinstance(item, threading.Event):
                    item.set()
                else:
                    self._socket.sendall(item if isinstance(item, bytes) else _framed(item))
                with self._lock:
                    self._waiting -= 1
        except OSError:
            pass  # the reader finds the same and reports it
        except Exception:
            log.exception("a message could not be written; the connection is given up")
        finally:
            self._hang_up()
            self._release()

    def _next(self) -> Message | bytes | threading.Event | None:
        while True:
            try:
                return self._outbox.get(timeout=BEAT_SECONDS)
            except queue.Empty:
                with self._lock:
                    if self._waiting == 0:
                        self._waiting = 1
                        return Beat()

    def _release(self) -> None:
        """Nobody waits for what will not be written."""
        while not self._outbox.empty():
            item = self._outbox.get()
            if isinstance(item, threading.Event):
                item.set()

    def _hang_up(self) -> None:
        """Shut the socket down; the descriptor itself goes with the last reference, never under a reading thread."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self._socket.close()
        _shut_down(self._connection)


SHORT_BYTES = 0x7FFFFFFF


def _framed(message: Message) -> bytes:
    """As `Connection.send_bytes` frames it."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    if len(body) > SHORT_BYTES:
        return struct.pack("!iQ", -1, len(body)) + body
    return struct.pack("!i", len(body)) + body


NOT_GREETED = (AuthenticationError, OSError, EOFError, AssertionError)
"""What a peer that is none of ours makes of a handshake; Python asserts that a challenge is one."""
GONE = frozenset({9, 32, 104, 107})  # EBADF, EPIPE, ECONNRESET, ENOTCONN: the other side was faster


def accept(sock: socket.socket, authkey: bytes, timeout: float) -> Connection:
    """Server's side of a new connection: prove and demand the key, all of it within `timeout` seconds."""
    connection = _limited(sock, timeout)
    late = threading.Timer(timeout, _shut_down, (connection,))
    late.daemon = True
    late.start()
    try:
        deliver_challenge(connection, authkey)
        answer_challenge(connection, authkey)
    except NOT_GREETED:
        late.cancel()
        late.join()  # it looks at the connection, whose number may soon be another's
        connection.close()
        raise
    late.cancel()
    late.join()
    return connection


def _shut_down(connection: Connection) -> None:
    """Wakes whoever reads or writes there."""
    try:
        with socket.socket(fileno=socket.dup(connection.fileno())) as peer:
            peer.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        if error.errno not in GONE:
            raise


def connect(address: tuple[str, int], authkey: bytes, timeout: float) -> Connection:
    """Client's side; WorkerError with the cause where nobody answers, or not as it should."""
    where = f"the engine at {address[0]}:{address[1]}"
    try:
        connection = _limited(socket.create_connection(address, timeout), timeout)
    except OSError as error:
        raise WorkerError(f"cannot reach {where} in {timeout:g} s: {type(error).__name__}: {error}") from error
    try:
        answer_challenge(connection, authkey)
        deliver_challenge(connection, authkey)
    except NOT_GREETED as error:
        connection.close()
        raise WorkerError(
            f"{where} did not greet this front-end in {timeout:g} s ({type(error).__name__}: {error}); "
            "the key is wrong, or another front-end is connected and has to leave first"
        ) from error
    return connection


def set_limit(connection: Connection, seconds: float) -> None:
    """No single read or write of this connection waits longer."""
    with socket.socket(fileno=socket.dup(connection.fileno())) as sock:
        _set_limit(sock, seconds)


def _limited(sock: socket.socket, seconds: float) -> Connection:
    sock.setblocking(True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _set_limit(sock, seconds)
    return Connection(sock.detach())


def _set_limit(sock: socket.socket, seconds: float) -> None:
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
