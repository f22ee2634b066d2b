"""What a server asks of its callers and what a client brings, as values; and whether an address is this machine's.

Paths only: certificates, keys and tokens are read where they are used, never kept in a configuration, so that printing
one gives nothing away. Imports no grpc.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import ConfigError

MAX_SECRET_BYTES = 1 << 20
BY_OTHERS = stat.S_IWGRP | stat.S_IRWXO
"""What nobody but the owner may do; the group may read, as mounted secrets of Kubernetes need it."""


@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """PEM files of the server: its certificate chain and key; client_ca: clients need a certificate that it signed."""

    cert: str  # the certificate chain
    key: str  # not encrypted, readable by its owner only
    client_ca: str | None = None  # let in only clients that this CA has signed


@dataclass(frozen=True, kw_only=True)
class Security:
    """How a server is protected. Nothing set: plain text, and everybody may do everything."""

    tls: TlsConfig | None = None
    token_file: str | None = None

    @property
    def authenticates(self) -> bool:
        return self.token_file is not None or (self.tls is not None and self.tls.client_ca is not None)


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a client brings: whom it trusts (tls without tls_ca: the public authorities), its certificate, its token."""

    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_server_name: str | None = None  # where the certificate names another host than the address does
    token_file: str | None = None
    plain_token: bool = False  # send the token without TLS to another machine, where everyone on the way can read it

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("a client's certificate and its key go together; give both or neither")
        if (self.tls_cert or self.tls_server_name) and not self.encrypted:
            raise ConfigError("a client's certificate and the server's name need TLS; give --tls-ca or --tls")

    @property
    def encrypted(self) -> bool:
        return self.tls or self.tls_ca is not None


def read_file(path: str, what: str) -> bytes:
    """The bytes of a PEM file that need not be secret."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from error


def read_secret(path: str, what: str) -> bytes:
    """The bytes of a file that only its owner may change and no stranger may read."""
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError(f"{what} {path} is no regular file")
            if found.st_mode & BY_OTHERS:
                mode = f"{stat.S_IMODE(found.st_mode):o}"
                raise ConfigError(f"{what} {path} can be read or changed by others (mode {mode}); run chmod 600 {path}")
            if found.st_uid not in (0, os.geteuid()):
                raise ConfigError(f"{what} {path} belongs to user {found.st_uid}; it must be this process's or root's")
            data = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_SECRET_BYTES:
        raise ConfigError(f"{what} {path} is larger than {MAX_SECRET_BYTES} bytes; is it the right file?")
    return data


def file_version(path: str) -> tuple[int, ...]:
    """What differs once a file was written or replaced; nothing where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there; all addresses of a name must be such."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except OSError:
        return False
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    return bool(addresses) and all(ipaddress.ip_address(address).is_loopback for address in addresses)


def shown_address(host: str, port: int) -> str:
    """HOST:PORT as clients take it: brackets around an IPv6 address (RFC 3986)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_exposure(host: str, security: Security, insecure: bool) -> None:
    """Refuse an address that others can reach where they could listen in, or call without saying who they are."""
    missing = []
    if security.tls is None:
        missing.append("no TLS (--tls-cert and --tls-key): whoever is on the way reads prompts, answers and tokens")
    if not security.authenticates:
        missing.append("neither tokens (--token-file) nor client certificates (--tls-client-ca): anybody may call it")
    if missing and not insecure and not is_loopback(host):
        raise ConfigError(
            f"server.host is {host!r}, which other machines can reach, and there is {'; and '.join(missing)}. Give "
            "what is missing, listen on 127.0.0.1, or say --insecure-listen-anywhere if something else guards the port"
        )
