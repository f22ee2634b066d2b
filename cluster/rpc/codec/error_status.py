"""The one table from exception to gRPC status, with google.rpc details: which field, which limit, whose fault, retry?

Used for a call that fails and for one item of a call. The first row whose class fits counts. Text and details are
kept short enough for HTTP/2 trailers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from cluster.access.access_errors import (
    AnswersUnread,
    NotAuthenticated,
    NotPermitted,
    OverQuota,
    RateLimited,
    SlowSender,
    TokensInFlight,
    TooManyCalls,
)
from cluster.request_errors import (
    DoesNotFit,
    Draining,
    DuplicateRequest,
    EngineFault,
    InvalidRequest,
    NoGuides,
    NotImplementedField,
    NoTokenizer,
    Quarantined,
    ReadingEnded,
    RequestFailed,
    RequestIdReused,
    RestartRefused,
    SlowReader,
    Violation,
    WrongTask,
)
from cluster.training.train_calls import (
    AnswerDropped,
    NoSaveRoot,
    NoSuchState,
    NotApplied,
    SaveUnderWay,
    SessionOpen,
    StateExists,
    StepConflict,
    TrainingCancelled,
    TrainingFailed,
    TrainingUnavailable,
)
from parallel.errors import (
    CapacityError,
    CheckpointError,
    CollectiveError,
    ConfigError,
    QueueFull,
    RequestError,
    TpError,
    WorkerError,
)

DOMAIN = "tp-decoders"
MAX_MESSAGE_CHARACTERS = 1000
MAX_VIOLATIONS = 8
MAX_RULE_CHARACTERS = 200
RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Row:
    """How one kind of error is reported."""

    kind: type[BaseException]
    code: StatusCode
    reason: str
    retryable: bool = False


TABLE = (
    Row(NotAuthenticated, StatusCode.UNAUTHENTICATED, "NOT_AUTHENTICATED"),
    Row(NotPermitted, StatusCode.PERMISSION_DENIED, "NOT_PERMITTED"),
    Row(RateLimited, StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED", retryable=True),
    Row(TokensInFlight, StatusCode.RESOURCE_EXHAUSTED, "TOKENS_IN_FLIGHT", retryable=True),
    Row(AnswersUnread, StatusCode.RESOURCE_EXHAUSTED, "ANSWERS_UNREAD", retryable=True),
    Row(TooManyCalls, StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS", retryable=True),
    Row(OverQuota, StatusCode.RESOURCE_EXHAUSTED, "OVER_QUOTA"),
    Row(InvalidRequest, StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS"),
    Row(NotImplementedField, StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED"),
    Row(NoTokenizer, StatusCode.FAILED_PRECONDITION, "NO_TOKENIZER"),
    Row(NoGuides, StatusCode.FAILED_PRECONDITION, "NO_GUIDES"),
    Row(Quarantined, StatusCode.FAILED_PRECONDITION, "QUARANTINED"),
    Row(DuplicateRequest, StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE"),
    Row(RequestIdReused, StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED"),
    Row(QueueFull, StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", retryable=True),
    Row(CapacityError, StatusCode.RESOURCE_EXHAUSTED, "DOES_NOT_FIT"),
    Row(WrongTask, StatusCode.FAILED_PRECONDITION, "WRONG_TASK"),
    Row(RequestError, StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    Row(Draining, StatusCode.UNAVAILABLE, "DRAINING", retryable=True),
    Row(RestartRefused, StatusCode.FAILED_PRECONDITION, "RESTART_REFUSED"),
    Row(EngineFault, StatusCode.UNAVAILABLE, "ENGINE_FAULT", retryable=True),
    Row(WorkerError, StatusCode.UNAVAILABLE, "WORKER_FAULT", retryable=True),
    Row(CollectiveError, StatusCode.UNAVAILABLE, "COLLECTIVE_FAULT", retryable=True),
    Row(AnswerDropped, StatusCode.FAILED_PRECONDITION, "ANSWER_DROPPED"),
    Row(StepConflict, StatusCode.FAILED_PRECONDITION, "STEP_CONFLICT"),
    Row(NotApplied, StatusCode.ABORTED, "NOT_APPLIED"),
    Row(SessionOpen, StatusCode.RESOURCE_EXHAUSTED, "SESSION_OPEN", retryable=True),
    Row(TrainingFailed, StatusCode.INTERNAL, "TRAINING_FAILED"),
    Row(TrainingCancelled, StatusCode.CANCELLED, "TRAINING_CANCELLED"),
    Row(TrainingUnavailable, StatusCode.FAILED_PRECONDITION, "NO_TRAINING"),
    Row(NoSaveRoot, StatusCode.FAILED_PRECONDITION, "NO_SAVE_ROOT"),
    Row(NoSuchState, StatusCode.NOT_FOUND, "NO_SUCH_STATE"),
    Row(StateExists, StatusCode.ALREADY_EXISTS, "STATE_EXISTS"),
    Row(SaveUnderWay, StatusCode.RESOURCE_EXHAUSTED, "SAVE_UNDER_WAY", retryable=True),
    Row(CheckpointError, StatusCode.FAILED_PRECONDITION, "CHECKPOINT_FAILED"),
    Row(ReadingEnded, StatusCode.ABORTED, "REQUEST_ENDED"),
    Row(SlowSender, StatusCode.ABORTED, "SLOW_SENDER"),
    Row(SlowReader, StatusCode.ABORTED, "SLOW_READER"),
    Row(RequestFailed, StatusCode.INTERNAL, "REQUEST_FAILED"),
    Row(ConfigError, StatusCode.FAILED_PRECONDITION, "CONFIGURATION"),
    Row(TpError, StatusCode.INTERNAL, "INTERNAL"),
    Row(BaseException, StatusCode.INTERNAL, "UNEXPECTED"),
)

OK = Status(code=StatusCode.OK.value[0])


def row_of(error: BaseException) -> Row:
    return next(row for row in TABLE if isinstance(error, row.kind))


def status_of(error: BaseException | None) -> Status:
    """The status of a call or of one item; OK for None."""
    if error is None:
        return OK
    row = row_of(error)
    message = str(error) if isinstance(error, TpError) else f"unexpected {type(error).__name__}: {error}"
    status = Status(code=row.code.value[0], message=_short(message, MAX_MESSAGE_CHARACTERS))
    for detail in _details(error, row):
        status.details.add().Pack(detail)
    return status


def _details(error: BaseException, row: Row) -> list[Message]:
    info = ErrorInfo(reason=row.reason, domain=DOMAIN, metadata={"retryable": str(row.retryable).lower()})
    details: list[Message] = [info]
    if isinstance(error, InvalidRequest | DoesNotFit):
        details.append(_bad_request(error.violations))
    elif isinstance(error, NotImplementedField):
        details.append(_bad_request((Violation(error.field, "not implemented"),)))
    elif isinstance(error, Quarantined):
        info.metadata.update(deaths=str(error.deaths), cause=_short("; ".join(error.causes), MAX_RULE_CHARACTERS))
    elif isinstance(error, WorkerError | CollectiveError):
        info.metadata.update(_whereabouts(str(error)))
    if row.retryable:
        seconds = getattr(error, "retry_seconds", RETRY_SECONDS)
        delay = Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
        details.append(RetryInfo(retry_delay=delay))
    return details


def _bad_request(violations: tuple[Violation, ...]) -> BadRequest:
    bad = BadRequest()
    for violation in violations[:MAX_VIOLATIONS]:
        bad.field_violations.add(field=violation.field, description=_short(violation.rule, MAX_RULE_CHARACTERS))
    return bad


def _whereabouts(message: str) -> dict[str, str]:
    """Faults are worded 'rank R on NODE: cause' where rank and node are known."""
    found = re.match(r"rank (\d+) on (\S+): (.*)", message, re.DOTALL)
    if found is None:
        return {"cause": _short(message, MAX_RULE_CHARACTERS)}
    rank, node, cause = found.groups()
    return {"rank": rank, "node": node, "cause": _short(cause, MAX_RULE_CHARACTERS)}


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
