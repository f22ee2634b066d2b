"""What a call can end with: a status of gRPC as an exception of its own class, with the server's words and details."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from tp_decoders.access.errors import ClientError, SettingsError

KINDS = (ErrorInfo, BadRequest, RetryInfo)
CODES = {code.value[0]: code for code in grpc.StatusCode}


class Violation(NamedTuple):
    """A field of the request and the rule that it breaks."""

    field: str
    rule: str


class ServiceError(ClientError, RuntimeError):
    """A call that the server, or the way to it, did not complete. Reads as `CODE: the server's words`.

    `code`: gRPC's status. `words`: as the server wrote them. `request_id`: of the call, where it has one; the server's
    log names it. `details`: messages of google.rpc (ErrorInfo, BadRequest, RetryInfo).
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    details: tuple[Message, ...] = ()
    words: str = ""
    request_id: str = ""

    @staticmethod
    def of(error: grpc.RpcError, advice: str = "", request_id: str = "") -> ServiceError:
        """Of a call that failed. `advice` is added to the text."""
        trailers: Any = error.trailing_metadata() or ()
        packed = dict(trailers).get("grpc-status-details-bin")
        details = _details(Status.FromString(packed)) if packed else ()
        return made(error.code(), error.details() or "", details, advice, request_id)

    @staticmethod
    def of_item(status: Status, request_id: str = "") -> ServiceError | None:
        """Of one item of a call; None where it went well."""
        if not status.code:
            return None
        return made(CODES.get(status.code, grpc.StatusCode.UNKNOWN), status.message, _details(status), "", request_id)

    @property
    def reason(self) -> str:
        """As in the table of docs/serving.md; empty where not the server itself has answered."""
        return next((detail.reason for detail in self.details if isinstance(detail, ErrorInfo)), "")

    @property
    def retry_after(self) -> float | None:
        """Seconds after which the server asks to be tried again; None where it does not."""
        delays = (detail.retry_delay for detail in self.details if isinstance(detail, RetryInfo))
        return next((delay.seconds + delay.nanos / 1e9 for delay in delays), None)

    @property
    def violations(self) -> tuple[Violation, ...]:
        """The fields that were wrong, and the rules."""
        broken = (detail.field_violations for detail in self.details if isinstance(detail, BadRequest))
        return tuple(Violation(one.field, one.description) for each in broken for one in each)


class InvalidArgument(ServiceError):
    """A field of the request is wrong: `violations`."""


class Unauthenticated(ServiceError):
    """No token, or one that the server does not know."""


class PermissionDenied(ServiceError):
    """A token whose roles do not include this call."""


class NotFound(ServiceError):
    """No saved state of that name."""


class AlreadyExists(ServiceError):
    """A name, or a request_id, that is taken."""


class FailedPrecondition(ServiceError):
    """Not as the server is set up, or as training stands."""


class LimitExceeded(ServiceError):
    """More than ever fits: the context, the cache, a message, a quota. The same call again fails again."""


class Overloaded(ServiceError):
    """No room at the moment: to be sent again after `retry_after` seconds."""


class Aborted(ServiceError):
    """Ended by the server, or not applied."""


class Unimplemented(ServiceError):
    """A method or a field that this server does not have."""


class Unavailable(ServiceError):
    """No server there, or one that is starting, stopping or lost its ranks."""


class DeadlineExceeded(ServiceError, TimeoutError):
    """The call took longer than its timeout."""


class Cancelled(ServiceError):
    """Cancelled, by another than the task that waits for it."""


class Internal(ServiceError):
    """A fault of the server."""


CLASSES: dict[grpc.StatusCode, type[ServiceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitExceeded,  # Overloaded where the server says when to come again
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INTERNAL: Internal,
    grpc.StatusCode.UNKNOWN: Internal,
    grpc.StatusCode.DATA_LOSS: Internal,
}


def made(
    code: grpc.StatusCode, words: str, details: Iterable[Message] = (), advice: str = "", request_id: str = ""
) -> ServiceError:
    """An error of the class that its code asks for."""
    details = tuple(details)
    kind = CLASSES.get(code, ServiceError)
    if kind is LimitExceeded and any(isinstance(detail, RetryInfo) for detail in details):
        kind = Overloaded
    error = kind(f"{code.name}: {words}" + (f"; {advice}" if advice else ""))
    error.code, error.words, error.details, error.request_id = code, words, details, request_id
    return error


def _details(status: Status) -> tuple[Message, ...]:
    return tuple(kind.FromString(item.value) for item in status.details for kind in KINDS if item.Is(kind.DESCRIPTOR))


__all__ = [
    "Aborted", "AlreadyExists", "Cancelled", "ClientError", "DeadlineExceeded", "FailedPrecondition", "Internal",
    "InvalidArgument", "LimitExceeded", "NotFound", "Overloaded", "PermissionDenied", "ServiceError", "SettingsError",
    "Unauthenticated", "Unavailable", "Unimplemented", "Violation", "made",
]  # fmt: skip
