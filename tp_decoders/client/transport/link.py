"""What both connections, the blocking one and that of an event loop, know of their server."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from tp_decoders.access.access import Access
from tp_decoders.access.addresses import Address
from tp_decoders.access.errors import SettingsError
from tp_decoders.client.errors import ServiceError, made
from tp_decoders.client.transport.connection_hints import advice
from tp_decoders.client.transport.retries import RETRY_SECONDS, Patience

Again = Callable[[Any], None]
DEFAULT: Any = object()
"""For a timeout: that of the client."""


@dataclass(frozen=True, kw_only=True)
class Manners:
    """How long a call may take in all, how long a lost server is waited for, how often one that is full is asked again.
    `timeout` None: no deadline. Seconds.
    """

    timeout: float | None = None
    retry_seconds: float = RETRY_SECONDS
    overload_retries: int = 0

    def __post_init__(self) -> None:
        check_seconds("timeout", self.timeout)
        if not 0 <= self.retry_seconds < float("inf"):
            raise SettingsError(f"retry_seconds is {self.retry_seconds}; give seconds, or 0 for no retries")
        if self.overload_retries < 0:
            raise SettingsError(f"overload_retries is {self.overload_retries}; give a count from 0 on")


class Link:
    """A server's place, what is brought to it, and whether it has ever answered."""

    def __init__(self, address: Address, access: Access, manners: Manners) -> None:
        self.address, self.access, self.manners = address, access, manners
        self.met = False

    def patience(self, timeout: Any) -> Patience:
        seconds = self.manners.timeout if timeout is DEFAULT else timeout
        check_seconds("timeout", seconds)
        return Patience(self.manners.retry_seconds, seconds, self.manners.overload_retries)

    def heard(self, error: grpc.RpcError, request: Message | None = None) -> ServiceError:
        """What a failed call says, with what may be in the way where it is not the server that has spoken."""
        lost = error.code() is grpc.StatusCode.UNAVAILABLE and not self.met
        hint = advice(self.address.host, self.access.encrypted, error.details() or "") if lost else ""
        found = ServiceError.of(error, hint, getattr(request, "request_id", ""))
        self.met |= bool(found.reason)
        return found

    def silent(self, seconds: float) -> ServiceError:
        """Nobody accepted a connection for so long."""
        words = f"{self.address.target}: no server answered within {seconds:g} s; "
        words += "is it running, and is the address right?"
        return made(grpc.StatusCode.UNAVAILABLE, words, advice=advice(self.address.host, self.access.encrypted))


def named(request: Any) -> Any:
    """The request, under an id that a retry repeats, where its kind has one."""
    if "request_id" in request.DESCRIPTOR.fields_by_name:
        request.request_id = request.request_id or uuid.uuid4().hex
    return request


def as_it_was(request: Any) -> None:
    """A repetition needs no other request than the first call."""


def check_seconds(name: str, seconds: Any) -> None:
    if seconds is not None and not (isinstance(seconds, int | float) and 0 < seconds < float("inf")):
        raise SettingsError(f"{name} is {seconds!r}; give seconds above 0, or None for no limit")
