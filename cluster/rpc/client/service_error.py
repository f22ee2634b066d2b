"""The one error of the client: a status of gRPC as a readable exception, with its google.rpc details."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from parallel.errors import TpError


class ServiceError(TpError, RuntimeError):
    """A call that the server, or the way to it, did not complete. `code` and `details` where they are known."""

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    details: tuple[Message, ...] = ()

    @classmethod
    def of(cls, error: grpc.RpcError, advice: str = "") -> ServiceError:
        code, text = error.code(), error.details()
        made = cls(f"{code.name}: {text}" + (f"; {advice}" if advice else ""))
        made.code = code
        made.details = _details(error)
        return made

    @property
    def reason(self) -> str:
        """As in the table of docs/serving.md; empty where not the server itself has answered."""
        return next((detail.reason for detail in self.details if isinstance(detail, ErrorInfo)), "")


def _details(error: grpc.RpcError) -> tuple[Message, ...]:
    trailers: Any = error.trailing_metadata() or ()
    packed = dict(trailers).get("grpc-status-details-bin")
    found: list[Message] = []
    for item in Status.FromString(packed).details if packed else ():
        for kind in (ErrorInfo, BadRequest, RetryInfo):
            if item.Is(kind.DESCRIPTOR):
                found.append(kind.FromString(item.value))
    return tuple(found)
