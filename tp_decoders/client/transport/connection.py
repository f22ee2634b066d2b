"""A connection for threads: calls of the protocol's messages, sent again where that is safe. Made anew after a fork."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1.health_pb2_grpc import HealthStub

from tp_decoders.access.errors import SettingsError
from tp_decoders.client.transport.channels import blocking_channel, call_metadata
from tp_decoders.client.transport.link import DEFAULT, Again, Link, as_it_was, named
from tp_decoders.client.transport.retries import Continued, Wait
from tp_decoders.protocol.control_pb2_grpc import ControlStub
from tp_decoders.protocol.inference_pb2_grpc import InferenceStub
from tp_decoders.protocol.training_pb2_grpc import TrainingStub

STUBS: dict[str, Any] = {
    "inference": InferenceStub, "control": ControlStub, "training": TrainingStub, "health": HealthStub
}  # fmt: skip


class _Channel:
    """A channel of this process, and what hangs on it."""

    def __init__(self, link: Link) -> None:
        self.pid = os.getpid()
        self.metadata = call_metadata(link.access)
        self.channel = blocking_channel(link.address.target, link.access)
        self.stubs = {name: stub(self.channel) for name, stub in STUBS.items()}

    def method(self, name: str) -> Any:
        service, _, method = name.partition(".")
        return getattr(self.stubs[service], method)


class Connection:
    """Calls from any thread of this process. `method` is a service and a method of it, as in "inference.Score"."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._now = _Channel(link)
        self._parents: list[_Channel] = []  # of the processes before a fork: never closed here
        self._closed = threading.Event()

    def close(self) -> None:
        """Ends open calls; no other can be made."""
        self._closed.set()
        if self._now.pid == os.getpid():
            self._now.channel.close()

    def ready(self, seconds: float) -> None:
        """Waits until the server accepts connections."""
        try:
            grpc.channel_ready_future(self._here().channel).result(seconds)
            self._link.met = True
        except grpc.FutureTimeoutError as error:
            raise self._link.silent(seconds) from error

    def call(self, method: str, request: Message, timeout: Any = DEFAULT) -> Any:
        """Any method with one answer, once; again only where a full server has refused it."""
        return self._answer(method, request, timeout, None)

    def ask(self, method: str, request: Any, timeout: Any = DEFAULT, again: Again = as_it_was) -> Any:
        """A method with one answer that may be sent again where the server is lost. `again` is called before that, and
        may raise instead.
        """
        return self._answer(method, named(request), timeout, again)

    def _answer(self, method: str, request: Any, timeout: Any, again: Again | None) -> Any:
        patience = self._link.patience(timeout)
        while True:
            here = self._here()
            try:
                call = here.method(method)
                answer = call(request, timeout=patience.time_left(), metadata=here.metadata)
                self._link.met = True
                return answer
            except grpc.RpcError as error:
                heard = self._link.heard(error, request)
                if again is None and heard.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise heard from error
                self._sleep(patience.wait(heard, self._link.met))
                if again is not None:
                    again(request)

    def chunks(
        self, request: Any, timeout: Any = DEFAULT, began: Callable[[Any], None] = lambda call: None
    ) -> Generator[Any]:
        """A stream's messages, each thing said once whatever happens to the server. Closing it cancels the call;
        `began` is given each call of gRPC, which another thread may cancel.
        """
        named(request)
        patience, continued = self._link.patience(timeout), Continued()
        while True:
            here = self._here()
            call = here.stubs["inference"].GenerateStream(request, timeout=patience.time_left(), metadata=here.metadata)
            began(call)
            try:
                for chunk in call:
                    self._link.met = True
                    patience.rest()
                    if (news := continued.news(chunk)) is not None:
                        yield news
                return
            except grpc.RpcError as error:
                heard = self._link.heard(error, request)
                self._sleep(patience.wait(heard, self._link.met))
                continued.begin_again(heard)
            finally:
                call.cancel()

    def _sleep(self, wait: Wait) -> None:
        if not self._closed.wait(wait.seconds) and wait.then is not None:
            raise wait.then

    def _here(self) -> _Channel:
        if self._closed.is_set():
            raise SettingsError("this client is closed; make another one")
        if self._now.pid != os.getpid():  # a fork: the connection is the parent's
            self._parents.append(self._now)
            self._now = _Channel(self._link)
        return self._now
