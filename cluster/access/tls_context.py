"""A server's TLS for what Python's own ssl encrypts: certificates are read again when they change, and files that do
not fit each other leave the certificate as it was.
"""

from __future__ import annotations

import logging
import ssl

from cluster.access.access_config import TlsConfig, file_version

log = logging.getLogger(__name__)


def server_context(tls: TlsConfig) -> ssl.SSLContext:
    """As the files are now; OSError (ssl.SSLError is one) where they cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, tls)
    return context


def _load(context: ssl.SSLContext, tls: TlsConfig) -> None:
    context.load_cert_chain(tls.cert, tls.key)
    if tls.client_ca is not None:
        context.load_verify_locations(tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED


class ServerContext:
    """One context for all connections, which shows each the certificate as it is at its handshake."""

    def __init__(self, tls: TlsConfig) -> None:
        self._tls = tls
        self._seen = self._version()
        self.context = server_context(tls)

    def refresh(self) -> None:
        """Before each handshake: the files again where they changed, if they fit each other."""
        version = self._version()
        if version == self._seen:
            return
        self._seen = version
        try:
            server_context(self._tls)
            _load(self.context, self._tls)
            log.info("the certificate of HTTP was read again")
        except OSError as error:
            log.error("HTTP keeps the certificate it had: %s", error)

    def _version(self) -> tuple[object, ...]:
        paths = (self._tls.cert, self._tls.key, self._tls.client_ca)
        return tuple(file_version(path) for path in paths if path is not None)
