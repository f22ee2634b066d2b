"""TLS of the server: PEM files to gRPC credentials, read again when they change. The client's: tp_decoders.client.

A new connection gets the files as they are then; what is connected stays so. Files that do not fit each other (one of
the two is already new) leave the certificate as it was until they do.
"""

from __future__ import annotations

import logging
import ssl
from typing import Any

import grpc

from cluster.access.access_config import TlsConfig, file_version, read_file, read_secret
from parallel.errors import ConfigError

log = logging.getLogger(__name__)
WHAT = {"cert": "the certificate", "key": "the key", "client_ca": "the clients' CA"}


class ServerCertificates:
    """The server's files as gRPC asks for them: once at the start, then before each handshake, from gRPC's threads."""

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._seen = self._version()
        self._first = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        asks = self._config.client_ca is not None
        fetch: Any = self._fetch  # None where nothing changed, which no stub knows
        return grpc.dynamic_ssl_server_credentials(self._first, fetch, asks)

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        version = self._version()
        if version == self._seen:
            return None
        self._seen = version
        try:
            fresh = self._read()
        except ConfigError as error:
            log.error("the server's certificate stays as it was: %s", error)
            return None
        log.info("the server's certificate was read again")
        return fresh

    def _read(self) -> grpc.ServerCertificateConfiguration:
        config = self._config
        key, cert = read_secret(config.key, WHAT["key"]), read_file(config.cert, WHAT["cert"])
        ca = None if config.client_ca is None else read_file(config.client_ca, WHAT["client_ca"])
        _check(config)
        return grpc.ssl_server_certificate_configuration([(key, cert)], ca)

    def _version(self) -> tuple[object, ...]:
        paths = (self._config.cert, self._config.key, self._config.client_ca)
        return tuple(file_version(path) for path in paths if path is not None)


def _check(config: TlsConfig) -> None:
    """gRPC reports a bad file at the first connection, in its own log; this says it at once."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.cert, config.key, password=lambda: "")  # never asks at the terminal
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or "not PEM, or the key is encrypted"
        raise ConfigError(f"{config.cert} and {config.key} are no certificate and its key: {reason}") from error
    try:
        if config.client_ca is not None:
            context.load_verify_locations(config.client_ca)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{WHAT['client_ca']} {config.client_ca} holds no certificate in PEM") from error
