"""The HTTP port of the metrics: who may bind it where, who may read it, and what a reader can hold up.

Where the server has a token file this port asks for a token of it, too (roles observe or control), checked by the same
code as a gRPC call; with TLS it shows the server's certificate, and asks for a client's where the server does.
Certificates are read for each connection. What is measured is launch.observe.prometheus_metrics.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from cluster.access.access_config import Security, is_loopback, shown_address
from cluster.access.access_errors import NotAuthenticated, NotPermitted
from cluster.access.roles import METRICS, Gate
from cluster.access.tls_context import server_context
from cluster.access.token_file import TokenFile
from parallel.errors import ConfigError, TpError

log = logging.getLogger(__name__)
Expose = Callable[[str], tuple[bytes, str]]
"""An Accept header to the numbers and their content type."""
READERS = 16
"""Connections at once; more are hung up on."""
WAIT_S = 10.0
"""For a handshake, for a request, and for a reader to take what it is sent."""


def check_host(host: str, security: Security, insecure: bool) -> None:
    """The rule of the gRPC port: others reach it over TLS, and known by a certificate or a token, or not at all."""
    tls = security.tls
    known = tls is not None and (tls.client_ca is not None or security.token_file is not None)
    if not (known or insecure or is_loopback(host)):
        raise ConfigError(
            f"observe.metrics_host is {host!r}, which other machines can reach, and there is not TLS with tokens "
            "(--token-file) or client certificates (--tls-client-ca): anybody could read the metrics. Give them, use "
            "127.0.0.1, or say --insecure-listen-anywhere if something else guards the port"
        )


def exposition(collector: Collector) -> Expose:
    """What writes a collector's numbers in the form that a reader's Accept header asks for."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)

    def expose(accept: str) -> tuple[bytes, str]:
        encode, kind = choose_encoder(accept)
        return encode(registry), kind

    return expose


class MetricsServer:
    """An HTTP port that answers /metrics, until `close`. Others than this machine may be let in: see `check_host`."""

    def __init__(self, collector: Collector, host: str, port: int, security: Security | None = None) -> None:
        try:
            self._server = _Server(host, port, exposition(collector), security or Security())
        except OSError as error:
            reason = error.strerror or str(error)
            where = shown_address(host, port)
            raise ConfigError(f"cannot give metrics on {where}: {reason}; choose another port") from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()
        self.port: int = self._server.server_port
        log.info("metrics on %s%s", shown_address(host, self.port), METRICS)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)


class _Server(ThreadingHTTPServer):
    """A thread for each connection, in which also the handshake happens: a slow one holds up nobody else."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, expose: Expose, security: Security) -> None:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = found[0]
        self.expose = expose
        self._tls = security.tls
        self._context = None if security.tls is None else server_context(security.tls)
        self._gate = Gate(None if security.token_file is None else TokenFile(security.token_file))
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(READERS)
        super().__init__(found[4][:2], _Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's asks a name server for this host's name
        self.server_name, self.server_port = "", self.socket.getsockname()[1]

    def check(self, headers: list[str]) -> None:
        """Lets a reader in or raises, as before a gRPC call."""
        with self._lock:
            self._gate.enter(METRICS, [("authorization", value) for value in headers])

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(WAIT_S)
        context = self._fresh()
        if context is None:
            _Handler(request, client_address, self)
        else:
            with context.wrap_socket(request, server_side=True) as encrypted:
                _Handler(encrypted, client_address, self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a reader of the metrics was lost", exc_info=True)

    def _fresh(self) -> ssl.SSLContext | None:
        """With the certificate as it is now; one that cannot be read leaves the old one."""
        if self._tls is not None:
            try:
                self._context = server_context(self._tls)
            except OSError as error:  # ssl.SSLError is one
                log.error("the metrics keep the certificate they had: %s", error)
        return self._context


class _Handler(BaseHTTPRequestHandler):
    """GET /metrics, and nothing else."""

    server: _Server
    timeout = WAIT_S

    def do_GET(self) -> None:
        try:
            self.server.check(self.headers.get_all("authorization", []))
        except TpError as error:
            log.info("a reader of the metrics was refused: %s", error)
            self._refuse(error)
            return
        if self.path.partition("?")[0] != METRICS:
            self._answer(404, f"there is only {METRICS} here\n".encode())
            return
        data, kind = self.server.expose(self.headers.get("accept", ""))
        self._answer(200, data, {"Content-Type": kind})

    def _refuse(self, error: TpError) -> None:
        status = 401 if isinstance(error, NotAuthenticated) else 403 if isinstance(error, NotPermitted) else 429
        more = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        self._answer(status, f"{error}\n".encode(), more)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "text/plain; charset=utf-8", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "tp-decoders"

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("a reader of the metrics: %s", args[1:])
