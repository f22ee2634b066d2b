"""One request and its answer: a body within a size and a time, an answer that its client must read within one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import BadHttpMessage

from cluster.access.access_errors import SlowSender
from cluster.frontend.requests.of_caller import turn_of_caller
from cluster.frontend.requests.offload import FairThreadPool
from cluster.http.http_errors import HttpError, failure_of
from cluster.http.replies.events import Events
from cluster.http.requests.json_body import parse
from cluster.request_errors import SlowReader
from cluster.rpc.services.connection_limits import ServerLimits

JSON = "application/json"
LARGE_BODY_BYTES = 64 * 1024
"""Larger ones are parsed beside the event loop."""
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # else nginx keeps the answer until it is whole
}
REQUEST_ID = "X-Request-Id"
BROKEN_BODY = (web.RequestPayloadError, ClientPayloadError, BadHttpMessage)
"""What reading a body raises that is not as its head says. Its connection ends."""


class Exchange:
    """Answers once: whole (`answer`), or as a stream (`write`, then `end`)."""

    def __init__(self, request: web.BaseRequest, limits: ServerLimits, started: float) -> None:
        self.request = request
        self.started = int(started)
        self.response: web.StreamResponse | None = None
        self._limits = limits
        self.request_id = request.headers.get(REQUEST_ID, "")

    async def body(self, pool: FairThreadPool) -> dict[str, Any]:
        """The JSON object that was sent."""
        if self.request_id and not (self.request_id.isascii() and self.request_id.isprintable()):
            raise HttpError.of(400, "invalid_fields", f"{REQUEST_ID} holds more than printable ASCII; give another")
        if self.request.content_type != JSON:  # also keeps out what a browser sends for any page without asking
            words = f"Content-Type is {self.request.content_type[:80]!r}; send {JSON}"
            raise HttpError.of(415, "unsupported_media_type", words)
        data = await self._bytes()
        return await pool.run(turn_of_caller(), parse, data) if len(data) > LARGE_BODY_BYTES else parse(data)

    async def answer(
        self, status: int, data: bytes, kind: str = JSON, headers: Mapping[str, str] | None = None
    ) -> None:
        """The whole answer; returns once it is on its way but for what the system buffers."""
        named = {REQUEST_ID: self.request_id} if self.request_id and self.request_id.isprintable() else {}
        told = {**named, **(headers or {}), "Content-Type": kind}
        self.response = web.Response(status=status, body=data, headers=told)
        await self._read_in_time(self._whole(self.response))

    async def write(self, data: bytes) -> None:
        """A piece of a stream, which begins with the first."""
        if not data:
            return
        if self.response is None:
            self.response = web.StreamResponse(headers={**STREAM_HEADERS, REQUEST_ID: self.request_id})
            await self.response.prepare(self.request)
        await self._read_in_time(self.response.write(data))

    async def end(self) -> None:
        """Of a stream."""
        assert self.response is not None, "a stream has begun"
        await self._read_in_time(self.response.write_eof())

    async def fail(self, error: Exception) -> None:
        """Tells an error: as an answer, or in a stream that has begun as its last event."""
        failure = failure_of(error)
        if self.response is None:
            await self.answer(failure.status, failure.data, headers=failure.headers)
        elif not self.response.prepared or isinstance(self.response, web.Response) or isinstance(error, SlowReader):
            if self.request.transport is not None:
                self.request.transport.abort()
        else:
            await self.write(Events.error(failure.body))
            await self.end()

    async def _whole(self, response: web.Response) -> None:
        await response.prepare(self.request)
        await response.write_eof()

    async def _bytes(self) -> bytes:
        most, found = self._limits.max_message_bytes, bytearray()
        too_large = HttpError.of(413, "too_large", f"the body is larger than {most} bytes; send less at a time")
        if (self.request.content_length or 0) > most:
            raise too_large
        try:
            async with asyncio.timeout(self._limits.receive_seconds):
                async for piece in self.request.content.iter_any():
                    found += piece
                    if len(found) > most:
                        raise too_large
        except TimeoutError as error:
            limit = f"{self._limits.receive_seconds:g} s"
            raise SlowSender(f"the body did not come within {limit}; send it, then wait for the answer") from error
        except BROKEN_BODY as error:
            words = "the body is not what Content-Encoding, Transfer-Encoding and Content-Length say; make them agree"
            raise HttpError.of(400, "invalid_body", words, {"Connection": "close"}) from error
        return bytes(found)

    async def _read_in_time(self, sending: Any) -> None:
        limit = self._limits.write_seconds
        try:
            async with asyncio.timeout(limit):
                await sending
        except TimeoutError as error:
            raise SlowReader(f"nothing was read for {limit:g} s; read faster, or ask again") from error
