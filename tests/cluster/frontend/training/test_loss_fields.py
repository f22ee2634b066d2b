"""No field of a training call is accepted and ignored: what its loss does not read is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from cluster.engine.request import ModelLimits
from cluster.frontend.requests.call import FrontendConfig
from cluster.frontend.training.loss_fields import (
    CHOICE_OPTIONS,
    OF_HEADS,
    OF_SEQUENCES,
    OPTIONS,
    option_fields,
    sequence_fields,
)
from cluster.frontend.training.train_requests import check
from cluster.request_errors import InvalidRequest
from cluster.rpc.services.training_service import train_call
from cluster.training.train_calls import TASK, Kind
from tp_decoders.model.task_config import CHOICES, SummaryConfig, TaskConfig
from tp_decoders.protocol import training_pb2 as pb

LIMITS = ModelLimits(vocab_size=20, max_context=16, kv_capacity_tokens=1 << 20, max_batch=0)
FULL: dict[str, Any] = {
    "token_ids": [1, 2, 3], "loss_weights": [1.0, 1.0], "old_logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0],
    "reference_logprobs": [-1.0, -1.0], "labels": [1, 2, 3], "values": [0.5], "chosen": True, "mark": 0,
}  # fmt: skip
SEQUENCE = {field.name for field in pb.TrainSequence.DESCRIPTOR.fields}
OPTION = {field.name for field in pb.LossOptions.DESCRIPTOR.fields}
HEADS = [TaskConfig(name=name) for name in OF_HEADS if name != CHOICES]
DOUBLE = TaskConfig(name=CHOICES, summary=SummaryConfig(kind="cls_index"))
LAST = replace(DOUBLE, summary=SummaryConfig(kind="last"))
CASES = [(loss, None) for loss in OF_SEQUENCES] + [(TASK, head) for head in (*HEADS, DOUBLE, LAST)]


def refused(message: Any, task: TaskConfig | None, kind: Kind = Kind.TRAIN_STEP) -> Sequence[str]:
    """The fields that are refused as unread."""
    try:
        check(train_call(kind, message), replace(LIMITS, task=task), FrontendConfig())
    except InvalidRequest as error:
        return [violation.field for violation in error.violations if "not read by" in violation.rule]
    return []


def test_every_field_of_the_messages_is_in_the_tables() -> None:
    read = frozenset().union(*OF_SEQUENCES.values(), *OF_HEADS.values())
    assert read | {"mark"} == SEQUENCE == set(FULL)
    assert frozenset().union(*OPTIONS.values()) | CHOICE_OPTIONS == OPTION


@pytest.mark.parametrize(("loss", "task"), CASES, ids=lambda value: getattr(value, "name", value))
def test_each_field_that_a_loss_does_not_read_is_refused_by_name(loss: str, task: TaskConfig | None) -> None:
    for name in sorted(SEQUENCE - {"token_ids"}):
        sequences = [{"token_ids": [1, 2, 3]}, {"token_ids": [1, 2, 3], name: FULL[name]}]
        message = pb.TrainStepRequest(sequences=sequences, loss=loss, expected_step=0)
        expected = [] if name in sequence_fields(loss, task) else [f"sequences[1].{name}"]
        assert refused(message, task) == expected, name
    for name in sorted(OPTION):
        message = pb.TrainStepRequest(sequences=[FULL], loss=loss, loss_options={name: 1}, expected_step=0)
        expected = [] if name in option_fields(loss, task) else [f"loss_options.{name}"]
        assert [field for field in refused(message, task) if field.startswith("loss_options")] == expected


@pytest.mark.parametrize("kind", [Kind.TRAIN_STEP, Kind.FORWARD_BACKWARD, Kind.EVALUATE])
def test_the_rule_is_that_of_every_call_with_sequences(kind: Kind) -> None:
    messages = {
        Kind.TRAIN_STEP: pb.TrainStepRequest, Kind.FORWARD_BACKWARD: pb.ForwardBackwardRequest,
        Kind.EVALUATE: pb.EvaluateRequest,
    }  # fmt: skip
    message = messages[kind](sequences=[{"token_ids": [1, 2], "values": [1.0], "mark": 0}], loss="cross_entropy")
    assert sorted(refused(message, None, kind)) == ["sequences[0].mark", "sequences[0].values"]
