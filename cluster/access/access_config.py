"""What a server asks of its callers, as values, beside what a client brings (tp_decoders.access).

Paths only: certificates, keys and tokens are read where they are used, never kept in a configuration, so that printing
one gives nothing away. Imports no grpc.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

from parallel.errors import ConfigError
from tp_decoders.access import private_files
from tp_decoders.access.access import Access
from tp_decoders.access.addresses import is_loopback

__all__ = ["Access", "Security", "TlsConfig", "check_exposure", "file_version", "is_loopback", "read_file",
           "read_secret", "shown_address"]  # fmt: skip
read_file = partial(private_files.read_file, error=ConfigError)
read_secret = partial(private_files.read_secret, error=ConfigError)


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


def file_version(path: str) -> tuple[int, ...]:
    """What differs once a file was written or replaced; nothing where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


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
