"""The HTTP server in the front-end's event loop: TLS, the door that it shares with gRPC, errors, an orderly end.

aiohttp reads heads and closes connections that send none in time; everything behind a head is counted, timed and
answered here. Nothing is answered to other origins: there is no CORS.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from aiohttp import web
from opentelemetry.trace import Tracer

from cluster.access.access_config import Security, shown_address
from cluster.access.callers import answering, client_of, name_of
from cluster.access.roles import OPEN
from cluster.access.tls_context import ServerContext
from cluster.frontend.call_traces import SPAN, Span, begin
from cluster.http.exchange import BROKEN_BODY, Exchange
from cluster.http.http_errors import HttpError
from cluster.http.routes import Api, Route
from cluster.rpc.services.connection_limits import ServerLimits
from cluster.rpc.services.door import Door, door_of
from parallel.errors import ConfigError

HINTS = {"/v1/responses": "; use /v1/chat/completions", "/": "; see /v1/models"}
TRACE_HEADERS = ("traceparent", "tracestate")


def _log_of_connections() -> logging.Logger:
    """aiohttp's, without a traceback for each client whose body is not what its head says: that has been answered."""
    log = logging.getLogger(f"{__name__}.connections")
    log.addFilter(_of_interest)
    return log


def _of_interest(record: logging.LogRecord) -> bool:
    return not isinstance(record.exc_info and record.exc_info[1], BROKEN_BODY)


class HttpServer:
    """Make it in the front-end's loop; `start`, then `stop`."""

    def __init__(
        self,
        api: Api,
        host: str,
        port: int,
        *,
        limits: ServerLimits | None = None,
        security: Security | None = None,
        door: Door | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """Port 0: any; see `port` once it has started. Without `door` it has one of its own."""
        self._routes: Mapping[str, Route] = api.routes()
        self._limits, security = limits or ServerLimits(), security or Security()
        self._door = door or door_of(self._limits, security)
        self._address, self.port = (host, port), port
        self._tls = None if security.tls is None else ServerContext(security.tls)
        self._tracer, self._started = tracer, time.time()
        self._listener: asyncio.Server | None = None
        self._web = web.Server(
            self._answer,  # type: ignore[arg-type]
            handler_cancellation=True,  # a client that goes ends its request
            keepalive_timeout=self._limits.receive_seconds,
            access_log=None,
            logger=_log_of_connections(),
        )

    async def start(self) -> None:
        """Listens; ConfigError where that cannot be."""
        host, port = self._address
        timed: dict[str, Any] = {} if self._tls is None else {"ssl_handshake_timeout": self._limits.handshake_seconds}
        context = None if self._tls is None else self._tls.context
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(self._connection, host, port, ssl=context, backlog=1024, **timed)
        except OSError as error:
            where, reason = shown_address(host, port), error.strerror or str(error)
            raise ConfigError(f"cannot listen on {where}: {reason}; choose another server.http_port") from error
        self.port = self._listener.sockets[0].getsockname()[1]

    def _connection(self) -> asyncio.Protocol:
        """Of one client, before its handshake."""
        if self._tls is not None:
            self._tls.refresh()
        return self._web()

    async def stop(self, grace: float = 5.0) -> None:
        """Take no more connections, give what runs `grace` seconds, then end it."""
        if self._listener is not None:
            self._listener.close()
            self._web.pre_shutdown()
            await self._web.shutdown(grace)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        exchange = Exchange(request, self._limits, self._started)
        try:
            await self._routed(exchange)
        except (ConnectionError, asyncio.CancelledError):
            raise  # the client is gone
        except Exception as error:  # noqa: BLE001 (the boundary: everything becomes an answer)
            await exchange.fail(error)
        assert exchange.response is not None, "everything is answered"
        return exchange.response

    async def _routed(self, exchange: Exchange) -> None:
        route = self._route(exchange.request)
        headers = [("authorization", value) for value in exchange.request.headers.getall("Authorization", [])]
        if exchange.request.method == "OPTIONS":
            await exchange.answer(204, b"", headers={"Allow": ", ".join(route.verbs)})
            return
        account = self._door.gate.enter(route.method, headers)
        peer, certificate = _peer(exchange.request)
        name = name_of(account, certificate)
        answering(account, name, peer)
        with ExitStack() as held:
            places = self._door.open_to_all if route.method == OPEN else self._door.open
            held.enter_context(places.one_of(client_of(name, peer), None if account is None else account.grant.calls))
            await self._traced(exchange, route)

    def _route(self, request: web.BaseRequest) -> Route:
        route = self._routes.get(request.path)
        if route is None:
            words = f"there is no {request.path[:200]!r} here{HINTS.get(request.path, '')}"
            raise HttpError.of(404, "not_found", words)
        if request.method not in route.verbs:
            allowed = ", ".join(route.verbs)
            words = f"{request.method[:20]} is not for {request.path[:200]}; use {route.verb}"
            raise HttpError.of(405, "method_not_allowed", words, {"Allow": allowed})
        return route

    async def _traced(self, exchange: Exchange, route: Route) -> None:
        """The handler, with a span around it where the request is sampled."""
        span = None if self._tracer is None else self._span(self._tracer, exchange.request)
        SPAN.set(span)
        if span is None:
            await route.handler(exchange)
            return
        error = ""
        try:
            await route.handler(exchange)
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            status = 0 if exchange.response is None else exchange.response.status
            span.end(time.monotonic(), {"http.response.status_code": status}, error=error)

    def _span(self, tracer: Tracer, request: web.BaseRequest) -> Span | None:
        headers = {name: request.headers[name] for name in TRACE_HEADERS if name in request.headers}
        values = {"http.request.method": request.method, "url.path": request.path}
        return begin(tracer, f"{request.method} {request.path}", headers, values)


def _peer(request: web.BaseRequest) -> tuple[str, str | None]:
    """The address as gRPC writes it, and the name in a client's certificate that was verified."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("the client is gone")
    found = transport.get_extra_info("peername") or ("", 0)
    host, port = str(found[0]).removeprefix("::ffff:"), found[1]
    peer = f"ipv6:%5B{host}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"
    subject = (transport.get_extra_info("peercert") or {}).get("subject", ())
    names = [value for part in subject for key, value in part if key == "commonName"]
    return peer, names[0] if names else None
