"""The listening TCP sockets of processes, from /proc: no tool of the machine is asked."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LISTEN = "0A"


@dataclass(frozen=True)
class Listener:
    pid: int
    host: str
    port: int

    @property
    def loopback(self) -> bool:
        address = ipaddress.ip_address(self.host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def listeners(pids: Iterable[int]) -> list[Listener]:
    """Of each process, what it holds; a socket that several hold counts for each."""
    sockets = {inode: where for name in ("tcp", "tcp6") for inode, where in _of_table(Path("/proc/net", name))}
    return [Listener(pid, *sockets[inode]) for pid in pids for inode in _inodes(pid) if inode in sockets]


def _of_table(path: Path) -> Iterator[tuple[str, tuple[str, int]]]:
    for line in path.read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == LISTEN:
            host, _, port = words[1].partition(":")
            yield words[9], (_address(host), int(port, 16))


def _address(shown: str) -> str:
    """The kernel shows words of 32 bits in the machine's order."""
    raw = b"".join(struct.pack("=I", int(shown[at : at + 8], 16)) for at in range(0, len(shown), 8))
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def _inodes(pid: int) -> Iterator[str]:
    try:
        handles = os.listdir(f"/proc/{pid}/fd")
    except (FileNotFoundError, ProcessLookupError):
        return
    for handle in handles:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{handle}")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if target.startswith("socket:["):
            yield target[len("socket:[") : -1]
