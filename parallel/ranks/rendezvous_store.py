"""Where ranks meet: a key-value store on rank 0 that listens on one address and answers who proves the group's key.

torch's TCPStore listens on every interface and believes everybody. Here both sides prove the key first
(parallel/keyed_listener.py); a value, a key and the whole store are bounded. What is exchanged then is plain: addresses
and names of shared memory, no weights and no prompts. `KeyedStore` is a torch.distributed Store, for process groups and
for `share`, until it is closed.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta

import torch.distributed as dist

from parallel.errors import CollectiveError
from parallel.keyed_listener import PROOF_S, KeyedListener, connected, exactly, shut_down

MOST_BYTES = 1 << 20
"""Of a key, of a value."""
STORE_BYTES = 64 << 20
SET, GET, ADD, CHECK, DELETE, SWAP = range(6)
OK, MISSING, REFUSED = range(3)
HEAD = struct.Struct("<BII")
"""What is asked (or how it went), and how many bytes of key and value follow."""


_OPEN: set[KeyedStore] = set()
"""What is built on a store in C++ (a PrefixStore, a process group) does not keep the Python object alive."""


class StoreServer:
    """Rank 0's side, in threads of its own until `close`."""

    def __init__(self, host: str, port: int, key: bytes) -> None:
        self._values: dict[bytes, bytes] = {}
        self._size = 0
        self._changed = threading.Condition()
        self._known: set[socket.socket] = set()
        self._closed = False
        self._listener = KeyedListener(host, port, key, self._serve)
        self.port = self._listener.address[1]
        threading.Thread(target=self._listener.run, name="store", daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for each in self._known:
                shut_down(each)  # its thread closes it

    def _serve(self, peer: socket.socket, _: str) -> None:
        with closing(peer):
            with self._changed:
                self._known.add(peer)
            try:
                while not self._closed:
                    peer.sendall(_message(*self._answer(*_read(peer))))
            except (OSError, EOFError, ValueError, struct.error):
                pass  # the rank is gone, or sends what it should not
            finally:
                with self._changed:
                    self._known.discard(peer)

    def _answer(self, what: int, key: bytes, value: bytes) -> tuple[int, bytes, bytes]:
        with self._changed:
            if what == CHECK:
                return (OK if key in self._values else MISSING), b"", b""
            if what == GET:  # waits as long as it was asked to
                limit = struct.unpack("<d", value)[0]
                found = self._changed.wait_for(lambda: key in self._values or self._closed, limit)
                return (OK, b"", self._values[key]) if found and key in self._values else (MISSING, b"", b"")
            if what == DELETE:
                gone = self._values.pop(key, None)
                self._size -= 0 if gone is None else len(key) + len(gone)
                return (MISSING if gone is None else OK), b"", b""
            if what == ADD:
                value = str(int(self._values.get(key, b"0")) + struct.unpack("<q", value)[0]).encode()
            elif what == SWAP:
                length = struct.unpack_from("<I", value)[0]
                expected, desired = value[4 : 4 + length], value[4 + length :]
                present = self._values.get(key)
                if (present or b"") != expected:
                    return OK, b"", expected if present is None else present
                value = desired
            status = self._put(key, value)
            return status, b"", b"" if what == SET else value

    def _put(self, key: bytes, value: bytes) -> int:
        size = self._size - (len(key) + len(self._values[key]) if key in self._values else 0) + len(key) + len(value)
        if size > STORE_BYTES:
            return REFUSED
        self._values[key], self._size = value, size
        self._changed.notify_all()
        return OK


class KeyedStore(dist.Store):
    """A rank's side; rank 0's holds the server."""

    def __init__(self, host: str, port: int, key: bytes, timeout: timedelta, *, serve: bool = False) -> None:
        super().__init__()
        self._key, self._limit = key, timeout
        self._server = StoreServer(host, port, key) if serve else None
        self._address = (host, self._server.port if self._server else port)
        self._idle: list[socket.socket] = []
        self._closed = False
        self._lock = threading.Lock()
        _OPEN.add(self)
        try:
            self._release(self._connection())  # whoever cannot reach it, or has another key, is told now
        except BaseException:
            self.close()
            raise

    def set(self, key: str, value: str | bytes) -> None:  # type: ignore[override]
        self._ask(SET, key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self._wait(key, self._limit)

    def add(self, key: str, amount: int) -> int:
        return int(self._ask(ADD, key, struct.pack("<q", amount))[1])

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:  # type: ignore[override]
        old, new = (each.encode() if isinstance(each, str) else bytes(each) for each in (expected, desired))
        return self._ask(SWAP, key, struct.pack("<I", len(old)) + old + new)[1]

    def check(self, keys: Sequence[str]) -> bool:  # type: ignore[override]
        return all(self._ask(CHECK, key, b"")[0] == OK for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        limit = timeout or self._limit
        deadline = time.monotonic() + limit.total_seconds()
        for key in keys:
            self._wait(key, limit, max(0.0, deadline - time.monotonic()))

    def delete_key(self, key: str) -> bool:
        return self._ask(DELETE, key, b"")[0] == OK

    def set_timeout(self, timeout: timedelta) -> None:
        self._limit = timeout

    @property
    def timeout(self) -> timedelta:
        return self._limit

    def close(self) -> None:
        """Hangs up; at rank 0 nobody is answered any more."""
        _OPEN.discard(self)
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for each in idle:
            each.close()
        if self._server is not None:
            self._server.close()

    def _wait(self, key: str, limit: timedelta, left_s: float | None = None) -> bytes:
        left_s = limit.total_seconds() if left_s is None else left_s
        status, value = self._ask(GET, key, struct.pack("<d", left_s), limit)
        if status != OK:
            raise CollectiveError(f"waited {limit.total_seconds():g} s for the ranks' key {key!r}, which nobody set")
        return value

    def _ask(self, what: int, key: str, value: bytes, patience: timedelta | None = None) -> tuple[int, bytes]:
        peer = self._connection()
        try:
            peer.settimeout((patience or self._limit).total_seconds() + PROOF_S)
            peer.sendall(_message(what, key.encode(), value))
            status, _, answer = _read(peer)
        except (OSError, EOFError) as error:
            peer.close()
            where = f"{self._address[0]}:{self._address[1]}"
            raise CollectiveError(f"the ranks' store at {where} is gone ({error}); rank 0 ended") from error
        self._release(peer)
        if status == REFUSED:
            raise CollectiveError(f"the ranks' store holds {STORE_BYTES} bytes and takes no more: {key!r}")
        return status, answer

    def _connection(self) -> socket.socket:
        """One that nobody uses now: threads do not wait for each other."""
        with self._lock:
            if self._closed:
                raise CollectiveError("the ranks' store was closed here")
            if self._idle:
                return self._idle.pop()
        return _connected(self._address, self._key, self._limit.total_seconds())

    def _release(self, peer: socket.socket) -> None:
        with self._lock:
            if not self._closed:
                return self._idle.append(peer)
        return peer.close()


def _connected(address: tuple[str, int], key: bytes, limit_s: float) -> socket.socket:
    """Tries until rank 0 listens and has time for this rank, at most for the limit."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return connected(address, key, max(0.1, min(limit_s, deadline - time.monotonic())))
        except PermissionError as error:
            raise CollectiveError(f"who answers at {address[0]}:{address[1]} has another key") from error
        except (OSError, EOFError) as error:
            if time.monotonic() >= deadline:
                raise CollectiveError(f"{address[0]}:{address[1]} was not reached: {error}") from error
            time.sleep(0.05)


def _message(what: int, key: bytes, value: bytes) -> bytes:
    return HEAD.pack(what, len(key), len(value)) + key + value


def _read(peer: socket.socket) -> tuple[int, bytes, bytes]:
    what, key, value = HEAD.unpack(exactly(peer, HEAD.size))
    if key > MOST_BYTES or value > MOST_BYTES:
        raise ValueError(f"a key of {key} or a value of {value} bytes; at most {MOST_BYTES}")
    return what, exactly(peer, key), exactly(peer, value)
