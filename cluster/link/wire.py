"""The connection between a front-end and rank 0: messages in order, each behind its length, every wait limited.

Both sides send a `Beat` each second, so silence means a dead, stopped or unreachable peer. The limits are the socket's
own (SO_RCVTIMEO, SO_SNDTIMEO): a read or write that takes longer raises.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
from collections import deque

from cluster.link.messages import LENGTH, MAX_BYTES, Beat, Message, decode, encode
from parallel.errors import WorkerError
from parallel.keyed_listener import connected, exactly, shut_down

log = logging.getLogger(__name__)
BEAT_SECONDS = 1.0
SILENCE_SECONDS = 8.0


class Wire:
    """One connection, whose peer has proved the key. `send` only queues; a thread writes, and beats while there is
    nothing to write. `send_now` writes in the caller's thread, as far as that takes no waiting. One thread may
    `receive`. What cannot be encoded is logged, and the connection given up.
    """

    def __init__(self, peer: socket.socket, name: str) -> None:
        self._peer = peer
        self._outbox: deque[bytearray | memoryview | threading.Event | None] = deque()
        """The first one is being written; nothing may overtake it. None: the end."""
        self._turn = threading.Condition()
        self._reading = threading.Lock()
        self._closed = False
        self._writer = threading.Thread(target=self._write, name=f"{name}-writer", daemon=True)
        self._writer.start()

    def send(self, message: Message) -> None:
        """Returns at once; what is sent on a closed wire is dropped."""
        if (frame := self._encoded(message)) is not None:
            self._queue(frame)

    def send_now(self, message: Message) -> bool:
        """As `send`, but whether it has left this process; it has where the peer reads and nothing else waits."""
        if (frame := self._encoded(message)) is None:
            return False
        with self._turn:
            sent = 0
            if not self._outbox and not self._closed:
                try:
                    sent = self._peer.send(frame, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    pass
                except OSError:
                    return False  # the reader finds the same and reports it
            if sent < len(frame):
                self._queue(memoryview(frame)[sent:])
            return sent == len(frame)

    def flush(self) -> threading.Event:
        """Set once all that was sent so far has left this process, or the wire is closed."""
        written = threading.Event()
        self._queue(written)
        return written

    def receive(self) -> Message:
        """The next message that says something. Raises EOFError or OSError when the peer is gone or silent, something
        else where it sent what is no message.
        """
        while True:
            with self._reading:
                (size,) = LENGTH.unpack(exactly(self._peer, LENGTH.size))
                if size > MAX_BYTES:
                    raise ValueError(f"a message of {size} bytes; at most {MAX_BYTES}")
                message = decode(exactly(self._peer, size))
            if not isinstance(message, Beat):
                return message

    def close(self, timeout: float = 2.0) -> None:
        """Write what is queued, then let go; wakes a thread in `receive`."""
        self._queue(None)
        self._writer.join(timeout)
        self._hang_up()
        with self._reading:  # never under a reading thread: the number may soon be another's
            self._peer.close()

    def _encoded(self, message: Message) -> bytearray | None:
        try:
            return None if self._closed else encode(message)
        except Exception:
            log.exception("a message could not be written; the connection is given up")
            self._hang_up()
            return None

    def _queue(self, item: bytearray | memoryview | threading.Event | None) -> None:
        with self._turn:
            if not self._closed:
                self._outbox.append(item)
                self._turn.notify()
            elif isinstance(item, threading.Event):
                item.set()

    def _write(self) -> None:
        try:
            while (frame := self._next()) is not None:
                self._peer.sendall(frame)
                with self._turn:
                    if not self._closed:
                        self._outbox.popleft()
        except OSError:
            pass  # the reader finds the same and reports it
        finally:
            self._hang_up()

    def _next(self) -> bytearray | memoryview | None:
        """What is to be written, still the first of its queue."""
        with self._turn:
            while True:
                self._turn.wait_for(lambda: self._outbox or self._closed, BEAT_SECONDS)
                if self._closed:
                    return None
                if not self._outbox:
                    self._outbox.append(encode(Beat()))
                if not isinstance(first := self._outbox[0], threading.Event):
                    return first
                self._outbox.popleft()
                first.set()

    def _hang_up(self) -> None:
        """Wakes both threads; nobody waits for what will not be written."""
        with self._turn:
            self._closed = True
            shut_down(self._peer)
            while self._outbox:
                if isinstance(item := self._outbox.pop(), threading.Event):
                    item.set()
            self._turn.notify()


def connect(address: tuple[str, int], authkey: bytes, timeout: float) -> socket.socket:
    """Client's side; WorkerError with the cause where nobody answers, or not as it should."""
    where = f"the engine at {address[0]}:{address[1]}"
    try:
        peer = connected(address, authkey, timeout, timeout)
    except (OSError, EOFError) as error:
        raise WorkerError(
            f"{where} did not greet this front-end in {timeout:g} s ({type(error).__name__}: {error}); "
            "nobody is there, the key is wrong, or another front-end is connected and has to leave first"
        ) from error
    set_limit(peer, timeout)
    return peer


def set_limit(peer: socket.socket, seconds: float) -> None:
    """No single read or write of this connection waits longer."""
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
