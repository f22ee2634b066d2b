"""The table of errors: every error of the project has its own row or its parent's, and details fit HTTP/2 trailers."""

from __future__ import annotations

import pickle

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

import cluster.access.access_errors as auth_errors
import cluster.request_errors as frontend_errors
import parallel.errors as base_errors
from cluster.request_errors import EngineFault, InvalidRequest, NotImplementedField, Violation
from cluster.rpc.codec.error_status import TABLE, row_of, status_of
from parallel.errors import CapacityError, QueueFull, RequestError, TpError

ALL = sorted(
    {
        kind
        for module in (base_errors, frontend_errors, auth_errors)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, TpError)
    },
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", ALL)
def test_every_error_of_the_project_has_a_status_with_its_message_and_a_reason(kind: type[TpError]) -> None:
    status = status_of(kind("what happened"))
    info = ErrorInfo.FromString(status.details[0].value)
    assert status.message == "what happened" and status.code != grpc.StatusCode.OK.value[0]
    assert info.domain == "tp-decoders" and info.reason and info.metadata["retryable"] in ("true", "false")
    retry = [detail for detail in status.details if detail.Is(RetryInfo.DESCRIPTOR)]
    assert bool(retry) == (info.metadata["retryable"] == "true")


def test_no_row_hides_a_later_one() -> None:
    for at, row in enumerate(TABLE):
        assert not any(issubclass(row.kind, earlier.kind) for earlier in TABLE[:at]), row.kind


def test_codes_are_those_a_client_can_act_on() -> None:
    codes = {name: row_of(error).code.name for name, error in {
        "wrong": RequestError("x"), "never fits": CapacityError("x"), "full": QueueFull("x"), "fault": EngineFault("x"),
        "bug": ZeroDivisionError("x"),
    }.items()}  # fmt: skip
    assert codes == {
        "wrong": "INVALID_ARGUMENT", "never fits": "RESOURCE_EXHAUSTED", "full": "RESOURCE_EXHAUSTED",
        "fault": "UNAVAILABLE", "bug": "INTERNAL",
    }  # fmt: skip


def test_a_fault_is_taken_apart_into_rank_node_and_cause() -> None:
    status = status_of(EngineFault("rank 3 on node-7.local: CollectiveError: rank 5 is late: 10 s"))
    assert dict(ErrorInfo.FromString(status.details[0].value).metadata) == {
        "rank": "3",
        "node": "node-7.local",
        "cause": "CollectiveError: rank 5 is late: 10 s",
        "retryable": "true",
    }


def test_long_messages_and_many_violations_stay_within_the_size_of_trailers() -> None:
    error = InvalidRequest.of([Violation(f"sampling.field{i}", "日" * 5000) for i in range(500)])
    status = status_of(error)
    bad = next(BadRequest.FromString(d.value) for d in status.details if d.Is(BadRequest.DESCRIPTOR))
    assert len(status.message) <= 1000 and 1 < len(bad.field_violations) <= 8
    assert len(status.SerializeToString()) < 10_000


def test_errors_survive_pickling_with_what_they_know() -> None:
    for error in (InvalidRequest.of([Violation("a", "b")]), NotImplementedField.of("a", "b")):
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error)) and vars(back)
