"""Requests that are no good HTTP, 10,000 by default, on sockets of our own: `malformed.py BASE [COUNT [PID]]`.

Good requests are cut, doubled, and have bytes flipped, put in and taken out; heads that lie about their bodies, huge
ones, and clients that leave at once are among them. No answer may be a 5xx, a good request must be answered afterwards,
and with the server's PID its memory and open files must be flat from the middle to the end.
"""

from __future__ import annotations

import random
import socket
import sys
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

AT_ONCE = 8
PATIENCE = 0.5  # seconds, after which the server is taken to wait for the rest of a request that was cut
BODY = b'{"prompt": "abc", "max_tokens": 1}'
ROUTES = (
    b"/v1/completions", b"/v1/chat/completions", b"/v1/embeddings", b"/tokenize", b"/detokenize", b"/health", b"/x",
)  # fmt: skip
HEADS = (
    b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 4, 5",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked",
    b"Content-Length: 3\r\nContent-Length: 40", b"X: " + b"y" * 9000,
    b": empty", b"Host: a\r\nHost: b", b"Expect: 100-continue", b"Expect: 200-never", b"Upgrade: h2c",
    b"Content-Encoding: gzip",
    b"X-Request-Id: \xff\xfe", b"Authorization: Bearer \0", b"traceparent: 00-zz-zz-01", b"Connection: close, upgrade",
)  # fmt: skip


def drawn(draw: random.Random) -> bytes:
    """One request, most likely a bad one."""
    verb = draw.choice((b"POST", b"POST", b"GET", b"PUT", b"OPTIONS", b"TRACE", b"\xff", b"G E T"))
    body = BODY if draw.random() < 0.6 else draw.randbytes(draw.randrange(60))
    lines = [verb + b" " + draw.choice(ROUTES) + b" HTTP/" + draw.choice((b"1.1", b"1.1", b"1.0", b"2.0", b"9"))]
    length = len(body) + draw.choice((0, 0, -3, 3))
    lines += [b"Host: x", b"Content-Type: application/json", b"Content-Length: %d" % length]
    for _ in range(draw.randrange(3)):
        lines.insert(draw.randrange(1, len(lines) + 1), draw.choice(HEADS))
    data = bytearray(b"\r\n".join(lines) + b"\r\n\r\n" + body)
    for _ in range(draw.choice((0, 0, 1, 1, 2, 8))):
        at = draw.randrange(len(data))
        match draw.randrange(4):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                data[at:at] = draw.randbytes(draw.randrange(1, 9))
            case 2:
                del data[at : at + draw.randrange(1, 9)]
            case _:
                data += data[at:]
        if not data:
            data = bytearray(b"\r\n")
    return bytes(data[: draw.randrange(len(data)) + 1] if draw.random() < 0.2 else data)


def ask(address: tuple[str, int], data: bytes, leaves: bool) -> str:
    """The status of what comes back; "left" where none was waited for, "waits" where the server wants more of it, "hung
    up" where it closed without an answer."""
    with socket.create_connection(address, timeout=20) as connection:
        found = b""
        try:
            connection.sendall(data)
            if leaves:
                return "left"
            connection.settimeout(PATIENCE)
            while b"\r\n" not in found and (piece := connection.recv(65536)):
                found += piece
        except TimeoutError:
            return "waits"
        except (ConnectionResetError, BrokenPipeError):
            pass
    return found.split(b" ", 2)[1].decode("latin1") if found.startswith(b"HTTP/") else "hung up"


def held(pid: str) -> tuple[int, int]:
    """Memory in MB and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 // 1_000_000, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def main(base: str, count: int, pid: str | None) -> None:
    address = urlsplit(base)
    where, draw, seen = (address.hostname or "", address.port or 0), random.Random(0), Counter[str]()
    middle = None
    asked = [(drawn(draw), draw.random() < 0.1) for _ in range(count)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for half in (asked[: count // 2], asked[count // 2 :]):
            found = list(pool.map(lambda one: ask(where, *one), half))
            seen.update(found)
            for status, (data, _) in zip(found, half, strict=True):
                if status.startswith("5"):
                    print(status, data[:400])
            if pid and middle is None:
                middle = held(pid)
    print(f"{count} requests:", dict(sorted(seen.items())))
    assert not [status for status in seen if status.startswith("5")], seen
    with urllib.request.urlopen(f"{base}/health", timeout=20) as answer:
        assert answer.status == 200
    print("afterwards /health is 200")
    if pid and middle:
        (before, opened), (after, open_now) = middle, held(pid)
        assert after - before <= 8 and open_now - opened <= 8, (middle, after, open_now)
        print(f"from the middle to the end: {after - before:+d} MB, {open_now - opened:+d} open files")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10_000, sys.argv[3] if len(sys.argv) > 3 else None)
