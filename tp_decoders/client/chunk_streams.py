"""Streams of typed chunks, blocking and asynchronous. Left early, they are cancelled, and the server frees their memory
within a step.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any, Self

from tp_decoders.client.errors import ServiceError
from tp_decoders.client.values.answers import Chunk, chunk


class Stream:
    """An iterator of chunks; also a context manager. `request_id` names it to the server, for `abort` and the log.

    `close` may be called from any thread; the iterator then ends. Of one prompt (`alone`) a failure is raised.
    """

    def __init__(self, connection: Any, request: Any, timeout: Any, alone: bool) -> None:
        self._present = _Present()
        self._alone = alone
        self._messages: Generator[Any] = connection.chunks(request, timeout, self._present.begun)
        self.request_id: str = request.request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        if self._present.closed:
            raise StopIteration
        try:
            return _typed(next(self._messages), self.request_id, self._alone)
        except ServiceError:
            if self._present.closed:  # meanwhile, by another thread
                raise StopIteration from None
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is left."""
        self._present.close()


class _Present:
    """The call of gRPC that a stream reads now. Apart from the stream, so that the generator does not keep it alive."""

    def __init__(self) -> None:
        self.closed = False
        self._call: Any = None

    def begun(self, call: Any) -> None:
        self._call = call
        if self.closed:
            call.cancel()

    def close(self) -> None:
        self.closed = True
        if self._call is not None:
            self._call.cancel()


class AsyncStream:
    """An asynchronous iterator of chunks; also a context manager, whose end, like `aclose`, cancels what is left."""

    def __init__(self, connection: Any, request: Any, timeout: Any, alone: bool) -> None:
        self._alone = alone
        self._messages: AsyncGenerator[Any] = connection.chunks(request, timeout)
        self.request_id: str = request.request_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        return _typed(await anext(self._messages), self.request_id, self._alone)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancels what is left."""
        await self._messages.aclose()


def _typed(message: Any, request_id: str, alone: bool) -> Chunk:
    found = chunk(message, request_id)
    if alone and found.error is not None:
        raise found.error
    return found
