"""Answers on their way to clients: a call keeps its place and its bytes until its answer has been sent.

grpc takes a message whole and holds it until the client's flow control lets it go, which a client can put off for
ever; ending the call does not give the memory back, only the end of the connection does. So bytes are counted, of
each client and of all, and a connection on which an answer stays stuck is closed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from cluster.access.access_errors import AnswersUnread
from cluster.request_errors import SlowReader
from parallel.errors import CapacityError

log = logging.getLogger(__name__)
ALWAYS_BYTES = 4 << 20
"""What a client may have on its way even where others have filled the server's own bound."""


@dataclass(frozen=True)
class Bounds:
    """Bytes on their way, and seconds for one answer to be sent."""

    message_bytes: int
    client_bytes: int
    all_bytes: int
    write_seconds: float


class UnsentAnswers:
    """What clients have not read yet. In one event loop only."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._bytes: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        return self._bytes.total()

    async def send(self, context: Any, client: str, data: bytes, held: ExitStack) -> None:
        """Sends the one answer of a call. `held` is closed once it has gone, which may be after the call has ended."""
        if len(data) > self._bounds.message_bytes:
            most = self._bounds.message_bytes
            raise CapacityError(f"the answer has {len(data)} bytes and {most} may be sent; ask for less at a time")
        held.enter_context(self._counted(client, len(data)))
        await context.send_initial_metadata(())  # by itself: a status can follow while the message is stuck
        write = asyncio.ensure_future(context.write(data))
        try:
            async with asyncio.timeout(self._bounds.write_seconds):
                await asyncio.shield(write)
        except TimeoutError as error:
            self._close_later(context.peer(), write)
            limit = f"{self._bounds.write_seconds:g} s"
            raise SlowReader(f"the answer's {len(data)} bytes were not read within {limit}; read faster") from error
        finally:
            if not write.done():
                kept = held.pop_all()
                write.add_done_callback(lambda done: _gone(done, kept))

    @contextmanager
    def _counted(self, client: str, size: int) -> Iterator[None]:
        mine, bounds = self._bytes[client] + size, self._bounds
        if mine > bounds.client_bytes and self._bytes[client]:
            raise AnswersUnread(f"{client} has {self._bytes[client]} bytes of answers on their way; read them first")
        if self.num_bytes + size > bounds.all_bytes and mine > ALWAYS_BYTES:
            raise AnswersUnread(f"{self.num_bytes} bytes of answers are on their way to all clients; retry later")
        self._bytes[client] += size
        try:
            yield
        finally:
            self._bytes[client] -= size
            if not self._bytes[client]:
                del self._bytes[client]

    def _close_later(self, peer: str, write: asyncio.Future[Any]) -> None:
        """The connection, if the answer is still stuck as long again after the call has ended."""

        def close() -> None:
            if not write.done():
                log.warning("%s reads no answers: its connection is closed", peer)
                hang_up(peer)

        asyncio.get_running_loop().call_later(self._bounds.write_seconds, close)


def _gone(write: asyncio.Future[Any], held: ExitStack) -> None:
    held.close()
    if not write.cancelled():
        write.exception()  # nobody else asks for it


def hang_up(peer: str) -> bool:
    """Shuts down this process's end of the connection to a grpc peer ("ipv4:1.2.3.4:5678"), which grpc has no call
    for; False where there is none."""
    kind, _, address = peer.partition(":")
    host, _, port = unquote(address).rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdecimal():
        return False
    wanted = (host.strip("[]"), int(port))
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = os.dup(int(name))
        except OSError:  # closed meanwhile
            continue
        try:
            found = socket.socket(fileno=copy)
        except OSError:  # no socket
            os.close(copy)
            continue
        with found:
            if _is_peer(found, wanted):
                found.shutdown(socket.SHUT_RDWR)
                return True
    return False


def _is_peer(found: socket.socket, wanted: tuple[str, int]) -> bool:
    try:
        host, port = found.getpeername()[:2]
    except (OSError, ValueError):
        return False
    mapped = str(host).removeprefix("::ffff:")
    return (mapped, port) == wanted or (host, port) == wanted
