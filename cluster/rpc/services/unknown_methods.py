"""grpc.aio's server, proof against calls of methods that it does not have.

In grpcio (seen in 1.85.1) the server's loop decodes the name of such a method, and a name that is not UTF-8 ends the
loop and with it the server: one connection without a certificate or token stops everybody's service. Here calls of
unknown methods never reach that loop; each is answered UNIMPLEMENTED whatever it is called. This leans on names of
grpcio that are not public; where they are missing the server is made as grpcio makes it, and the log says so.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

log = logging.getLogger(__name__)
NEEDED = ("_handle_rpc", "_schedule_rpc_coro", "_MethodResolver")
PLAIN: Any = cygrpc.AioServer


def _tells_nothing_sent(record: logging.LogRecord) -> bool:
    """grpcio logs metadata that it cannot decode, which may be a token."""
    return not str(record.msg).startswith("Invalid encoding")


logging.getLogger("grpc._cython.cygrpc").addFilter(_tells_nothing_sent)


class UnknownMethodsServer(PLAIN):
    """Takes calls without a registered method out of the loop's hands."""

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        if method is not None:
            future: asyncio.Future[Any] = super()._make_request_call_future(method)
            return future
        return asyncio.get_running_loop().create_task(self._turn_strangers_away())

    async def _turn_strangers_away(self) -> None:
        """Until the server stops, which `_request_call` raises."""
        loop, nobody = asyncio.get_running_loop(), cygrpc._MethodResolver([], {})
        answers: set[asyncio.Task[None]] = set()  # a loop keeps no task alive
        while True:
            call = await self._request_call()
            answer = cygrpc._handle_rpc("", nobody, (), call, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(answer, call, loop, ""))
            answers.add(task)
            task.add_done_callback(answers.discard)


def make_server(**options: Any) -> grpc.aio.Server:
    """As grpc.aio.server. All methods must be registered ones, as generated code makes them."""
    if not hasattr(PLAIN, "_make_request_call_future") or not all(hasattr(cygrpc, name) for name in NEEDED):
        log.warning("this grpcio is another than the one known here: a call with a broken name may stop the server")
        return grpc.aio.server(**options)
    cygrpc.AioServer = UnknownMethodsServer
    try:
        return grpc.aio.server(**options)
    finally:
        cygrpc.AioServer = PLAIN
