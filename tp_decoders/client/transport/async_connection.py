"""A connection of one event loop: calls of the protocol's messages, sent again where that is safe."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import Any

import grpc
from google.protobuf.message import Message

from tp_decoders.access.errors import SettingsError
from tp_decoders.client.transport.channels import async_channel, call_metadata
from tp_decoders.client.transport.connection import STUBS
from tp_decoders.client.transport.link import DEFAULT, Again, Link, as_it_was, named
from tp_decoders.client.transport.retries import Continued, Wait


class AsyncConnection:
    """Calls from the event loop in which it was made; methods as in Connection."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._pid, self._closed = os.getpid(), False
        self.metadata = call_metadata(link.access)
        self.channel = async_channel(link.address.target, link.access)
        self.stubs = {name: stub(self.channel) for name, stub in STUBS.items()}

    async def close(self) -> None:
        """Ends open calls; no other can be made."""
        self._closed = True
        if self._pid == os.getpid():
            await self.channel.close(None)

    async def ready(self, seconds: float) -> None:
        """Waits until the server accepts connections."""
        self._check()
        try:
            async with asyncio.timeout(seconds):
                await self.channel.channel_ready()
                self._link.met = True
        except TimeoutError as error:
            raise self._link.silent(seconds) from error

    async def call(self, method: Any, request: Message, timeout: Any = DEFAULT) -> Any:
        """Any method with one answer, once; again only where a full server has refused it."""
        return await self._answer(method, request, timeout, None)

    async def ask(self, method: Any, request: Any, timeout: Any = DEFAULT, again: Again = as_it_was) -> Any:
        """A method with one answer that may be sent again where the server is lost. `again` is called before that, and
        may raise instead.
        """
        return await self._answer(method, named(request), timeout, again)

    async def _answer(self, method: Any, request: Any, timeout: Any, again: Again | None) -> Any:
        patience = self._link.patience(timeout)
        while True:
            self._check()
            try:
                call = self._method(method)(request, timeout=patience.time_left(), metadata=self.metadata)
                answer = await call
                self._link.met = True
                return answer
            except grpc.RpcError as error:
                heard = self._link.heard(error, request)
                if again is None and heard.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise heard from error
                await _sleep(patience.wait(heard, self._link.met))
                if again is not None:
                    again(request)

    async def chunks(self, request: Any, timeout: Any = DEFAULT) -> AsyncGenerator[Any]:
        """A stream's messages, each thing said once whatever happens to the server. Closing it cancels the call."""
        self._check()
        named(request)
        patience, continued = self._link.patience(timeout), Continued()
        while True:
            call = self.stubs["inference"].GenerateStream(request, timeout=patience.time_left(), metadata=self.metadata)
            try:
                async for chunk in call:
                    self._link.met = True
                    patience.rest()
                    if (news := continued.news(chunk)) is not None:
                        yield news
                return
            except grpc.RpcError as error:
                heard = self._link.heard(error, request)
                await _sleep(patience.wait(heard, self._link.met))
                continued.begin_again(heard)
            finally:
                call.cancel()

    def _method(self, method: Any) -> Any:
        if not isinstance(method, str):
            return method
        service, _, name = method.partition(".")
        return getattr(self.stubs[service], name)

    def _check(self) -> None:
        if self._closed:
            raise SettingsError("this client is closed; make another one")
        if self._pid != os.getpid():
            raise SettingsError(
                f"this client belongs to process {self._pid}, and this is {os.getpid()}: grpc.aio does not outlive a "
                "fork; make a client after the fork, or use the blocking one"
            )


async def _sleep(wait: Wait) -> None:
    await asyncio.sleep(wait.seconds)
    if wait.then is not None:
        raise wait.then
