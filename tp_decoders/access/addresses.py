"""Addresses as people write them, and whether one is this machine's."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass

from tp_decoders.access.errors import SettingsError

VARIABLE = "TP_DECODERS_ADDRESS"
DEFAULT = "127.0.0.1:50051"
SCHEMES = {"grpc": False, "grpcs": True}


@dataclass(frozen=True)
class Address:
    """A server's place: HOST:PORT as gRPC takes it, and whether its scheme asks for TLS."""

    target: str
    tls: bool = False

    @property
    def host(self) -> str:
        return host_of(self.target)


def address_of(text: str | None = None, what: str = "the address") -> Address:
    """From HOST:PORT, grpc://HOST:PORT or grpcs://HOST:PORT (TLS). None: what TP_DECODERS_ADDRESS holds, else this
    machine's port 50051. Raises SettingsError, which calls the text `what`.
    """
    if text is None:
        text, what = os.environ.get(VARIABLE) or DEFAULT, VARIABLE
    scheme, mark, rest = text.partition("://")
    if mark and scheme not in SCHEMES:
        raise SettingsError(
            f"{what} is {text!r}; this client speaks gRPC: write host:port, grpc:// or grpcs://host:port"
        )
    target = rest.rstrip("/") if mark else text
    host, colon, port = target.rpartition(":")
    if not (colon and host and "/" not in host and port.isdecimal() and 0 < int(port) < 65536):
        raise SettingsError(f"{what} is {text!r}; write host:port, as in localhost:50051")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise SettingsError(f"{what} is {text!r}; write an IPv6 address in brackets, as in [::1]:50051")
    return Address(target, SCHEMES.get(scheme, False) if mark else False)


def host_of(address: str) -> str:
    """Of HOST:PORT, without the brackets around an IPv6 address."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there; all addresses of a name must be such."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except OSError:
        return False
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    return bool(addresses) and all(ipaddress.ip_address(address).is_loopback for address in addresses)
