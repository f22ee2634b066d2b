"""A client of HTTP/2 by hand: calls of grpc methods, and a window that the client decides on."""

from __future__ import annotations

import socket
import struct
import time

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING = 0, 1, 3, 4, 6
ACK = END_STREAM = 1
END_HEADERS = 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def header(name: str, value: str) -> bytes:
    """One that fits a length byte each, not indexed."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


class RawClient:
    """One connection. It answers pings and grants `window` bytes of each stream, never more."""

    def __init__(self, port: int, window: int = 65535, source: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 20, (source, 0))
        self._stream, self._rest = 1, b""
        self.frames: list[tuple[int, int, int]] = []
        """(kind, flags, stream) of all that came."""
        self.socket.sendall(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, window)) + frame(SETTINGS, ACK, 0))

    def call(self, path: str, message: bytes = b"") -> int:
        stream, self._stream = self._stream, self._stream + 2
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x"}
        fields |= {"content-type": "application/grpc", "te": "trailers"}
        block = b"".join(header(name, value) for name, value in fields.items())
        body = b"\0" + len(message).to_bytes(4, "big") + message
        parts = [body[at : at + 16384] for at in range(0, len(body), 16384)]
        data = b"".join(frame(DATA, END_STREAM if part is parts[-1] else 0, stream, part) for part in parts)
        self.socket.sendall(frame(HEADERS, END_HEADERS, stream, block) + data)
        return stream

    def tend(self, seconds: float) -> bool:
        """Takes what comes for a while; False once the server has hung up."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                data = self.socket.recv(1 << 16)
                self._take(data)
            except TimeoutError:
                return True
            except ConnectionError:
                return False
            if not data:
                return False
        return True

    def _take(self, data: bytes) -> None:
        self._rest += data
        while len(self._rest) >= 9 and len(self._rest) >= (size := 9 + int.from_bytes(self._rest[:3], "big")):
            kind, flags, stream = self._rest[3], self._rest[4], int.from_bytes(self._rest[5:9], "big")
            if kind == PING and not flags & ACK:
                self.socket.sendall(frame(PING, ACK, 0, self._rest[9:size]))
            self.frames.append((kind, flags, stream))
            self._rest = self._rest[size:]

    def ended(self) -> int:
        """Streams that the server has ended."""
        return sum(kind == HEADERS and flags & END_STREAM == END_STREAM for kind, flags, _ in self.frames)

    def close(self) -> None:
        self.socket.close()
