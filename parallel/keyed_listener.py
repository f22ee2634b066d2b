"""A listening socket that hands on whoever proves a shared key, and nobody else.

Both sides prove it (HMAC-SHA256 over a nonce of each, RFC 2104), within a few seconds and before anything else is read.
What is said afterwards is the owner's business, and plain.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

log = logging.getLogger(__name__)
NONCE = 32
PROOF_S = 5.0
"""For both proofs, in all."""
MOST_STRANGERS = 16
"""Connections that have not proved the key yet. With one more, the oldest of them goes."""
POLITE_S = 0.05
"""So long a further one waits for that: a proof takes a moment, and all peers may come at once."""


class KeyedListener:
    """Listens at once; `run` accepts until `close`. Every connection has a thread, in which `known` gets it, and its
    address in words, once the key is proved; from then on it is the owner's.
    """

    def __init__(self, host: str, port: int, key: bytes, known: Callable[[socket.socket, str], None]) -> None:
        self._key, self._known = key, known
        self._room = threading.BoundedSemaphore(MOST_STRANGERS)
        self._strangers: dict[socket.socket, None] = {}  # the oldest first
        self._lock = threading.Lock()
        self._closed = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()[:2]
        return host, port

    def run(self) -> None:
        """Until `close`, in a thread of the owner's."""
        while not self._closed.is_set():
            try:
                peer, where = self._listener.accept()
            except OSError as error:
                if not self._closed.wait(0.1):  # out of file handles, say: those that are here go on
                    log.error("no connection can be accepted: %s", error)
                continue
            while not self._room.acquire(timeout=POLITE_S):
                self._hang_up_on_the_oldest()
            with self._lock:
                self._strangers[peer] = None
            name = f"{where[0]}:{where[1]}"
            threading.Thread(target=self._meet, args=(peer, name), name="keyed-listener", daemon=True).start()

    def close(self) -> None:
        """Nobody is let in any more; those that were are the owner's."""
        self._closed.set()
        with self._lock:
            for each in (self._listener, *self._strangers):
                shut_down(each)  # its thread closes it
        self._listener.close()

    def _hang_up_on_the_oldest(self) -> None:
        with self._lock:
            oldest = next(iter(self._strangers), None)
            if oldest is not None:
                del self._strangers[oldest]
                shut_down(oldest)  # under the lock: not closed yet, so the number is still its own

    def _meet(self, peer: socket.socket, where: str) -> None:
        try:
            proof = _challenged(peer, self._key)
        except (OSError, EOFError) as error:  # a wrong proof is a PermissionError, which is an OSError
            log.warning("refused a connection from %s: %s: %s", where, type(error).__name__, error)
            proof = None
        with self._lock:
            late = peer not in self._strangers  # the oldest of too many
            self._strangers.pop(peer, None)
            if proof is None or late or self._closed.is_set():
                proof = None
                peer.close()
        self._room.release()
        if proof is not None:
            with suppress(OSError):  # gone already: its owner finds the same
                peer.sendall(proof)
                peer.settimeout(None)
            self._known(peer, where)


def connected(address: tuple[str, int], key: bytes, limit_s: float, proof_s: float = PROOF_S) -> socket.socket:
    """A connection to a KeyedListener, both proofs done. PermissionError where who answers has another key; OSError or
    EOFError where nobody does, or not to the end.
    """
    peer = socket.create_connection(address, limit_s)
    try:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _prove(peer, key, proof_s)
    except BaseException:
        peer.close()
        raise
    return peer


def _prove(peer: socket.socket, key: bytes, limit_s: float) -> None:
    """The client's side: its own proof, then the server's. Each is over both nonces, its own first, and says whose it
    is, so that none serves in the other's place. PermissionError where the server's is wrong.
    """
    deadline, mine = time.monotonic() + limit_s, secrets.token_bytes(NONCE)
    peer.settimeout(limit_s)
    peer.sendall(mine)
    theirs = exactly(peer, NONCE, deadline)
    peer.sendall(_proof(key, b"client", mine + theirs))
    if not hmac.compare_digest(exactly(peer, NONCE, deadline), _proof(key, b"server", theirs + mine)):
        raise PermissionError("the proof is wrong")
    peer.settimeout(None)


def _challenged(peer: socket.socket, key: bytes) -> bytes:
    """The server's side, up to its own proof, which is returned; PermissionError where the client's is wrong."""
    deadline, mine = time.monotonic() + PROOF_S, secrets.token_bytes(NONCE)
    peer.settimeout(PROOF_S)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.sendall(mine)
    theirs = exactly(peer, NONCE, deadline)
    given = exactly(peer, NONCE, deadline)
    if not hmac.compare_digest(given, _proof(key, b"client", theirs + mine)):
        peer.sendall(bytes(NONCE))  # which tells the client why
        raise PermissionError("the proof is wrong")
    return _proof(key, b"server", mine + theirs)


def _proof(key: bytes, side: bytes, nonces: bytes) -> bytes:
    return hmac.digest(key, side + nonces, "sha256")


def exactly(peer: socket.socket, count: int, deadline: float | None = None) -> bytes:
    """So many bytes, which take memory as they arrive; EOFError where the peer hangs up first."""
    parts, left = [], count
    while left:
        if deadline is not None:
            peer.settimeout(max(0.001, deadline - time.monotonic()))
        part = peer.recv(min(left, 1 << 20))
        if not part:
            raise EOFError("the connection was closed")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def shut_down(peer: socket.socket) -> None:
    """Wakes whoever reads or writes there."""
    with suppress(OSError):
        peer.shutdown(socket.SHUT_RDWR)
