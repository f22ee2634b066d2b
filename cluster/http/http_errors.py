"""Exceptions as HTTP: a status, OpenAI's error object and headers. What an exception means is the one table's
(cluster/rpc/codec/error_status.py); here is only how each of its codes is said in HTTP.

Its clients try again after 408, 409, 429 and 5xx, twice, so nothing that can never work has one of these.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.request_errors import DoesNotFit, InvalidRequest, NotImplementedField, Violation
from cluster.rpc.codec.error_status import RETRY_SECONDS, row_of
from parallel.errors import TpError

log = logging.getLogger(__name__)
STATUS = {
    "UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403, "NOT_FOUND": 404, "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429, "INVALID_ARGUMENT": 400, "UNIMPLEMENTED": 400, "FAILED_PRECONDITION": 400,
    "UNAVAILABLE": 503, "ABORTED": 503, "CANCELLED": 503, "INTERNAL": 500,
}  # fmt: skip
BY_REASON = {"DOES_NOT_FIT": 400, "OVER_QUOTA": 400, "SLOW_SENDER": 408}
"""Where one kind of error is said otherwise than its code."""
KIND = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
NAMES = {
    "prompts": "prompt", "sequences": "input", "texts": "prompt", "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens", "stop_sequences": "stop", "include_stop_sequence": "include_stop_str_in_output",
}  # fmt: skip
"""Fields that HTTP calls otherwise."""


class HttpError(TpError, RuntimeError):
    """What is wrong with a request as one of HTTP, before it becomes a call."""

    status: int = 400
    code: str = "invalid_request"
    headers: Mapping[str, str] = {}

    @classmethod
    def of(cls, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> HttpError:
        error = cls(message)
        error.status, error.code, error.headers = status, code, headers or {}
        return error


@dataclass(frozen=True)
class Failure:
    """An error on its way to the client."""

    status: int
    body: dict[str, object]
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def data(self) -> bytes:
        return json.dumps(self.body).encode()


def failure_of(error: Exception) -> Failure:
    """How an exception is told."""
    if isinstance(error, HttpError):
        body = _body(str(error), KIND.get(error.status, "invalid_request_error"), None, error.code)
        return Failure(error.status, body, dict(error.headers))
    row = row_of(error)
    status = BY_REASON.get(row.reason, STATUS[row.code.name])
    if status == 500:
        log.error("an HTTP request failed: %s", error, exc_info=error)
    param, message = _where(error)
    too_long = isinstance(error, DoesNotFit) and param in ("prompt", "input")
    code = "context_length_exceeded" if too_long else row.reason.lower()
    return Failure(status, _body(message, KIND.get(status, "server_error"), param, code), _headers(error, status))


def _headers(error: Exception, status: int) -> dict[str, str]:
    seconds = getattr(error, "retry_seconds", RETRY_SECONDS)
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    if status == 409 and row_of(error).reason == "REQUEST_ID_REUSED":
        return {"x-should-retry": "false"}
    if status in (429, 503):
        return {"Retry-After": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}
    return {}


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _where(error: Exception) -> tuple[str | None, str]:
    """The field that is to blame, and the words, with the names that HTTP has for fields."""
    if isinstance(error, InvalidRequest | DoesNotFit) and error.violations:
        told = [Violation(_name(v.field), v.rule) for v in error.violations]
        return told[0].field.partition("[")[0], "; ".join(map(str, told))
    if isinstance(error, NotImplementedField):
        return error.field, str(error)
    words = str(error) if isinstance(error, TpError) else "the server failed on this request; its log says why"
    return None, words


def _name(given: str) -> str:
    """sampling.top_k is top_k, prompts[2] is prompt[2]."""
    name, bracket, rest = given.partition("[")
    last = name.rpartition(".")[2]
    return f"{NAMES.get(last, last)}{bracket}{rest}"
