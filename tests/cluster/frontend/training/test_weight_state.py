"""What a rebuilt engine has to be given after training, and what training calls it lets through."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.frontend.training.weight_state import WeightState
from cluster.training.train_calls import Kind, RestorePoint, StepConflict, TrainAnswer, TrainCall
from parallel.errors import WorkerError


def answered(record: WeightState, kind: Kind, step: int, version: int, name: str = "", **fields: Any) -> None:
    record.note(TrainCall(kind=kind, name=name), TrainAnswer(step=step, weight_version=version, **fields))


def call(kind: Kind = Kind.TRAIN_STEP, **fields: Any) -> TrainCall:
    return TrainCall(kind=kind, **fields)


def test_weights_that_nobody_trained_are_the_checkpoints() -> None:
    record = WeightState()
    answered(record, Kind.STATE, 0, 0)
    answered(record, Kind.EVALUATE, 0, 0)
    answered(record, Kind.SAVE, 0, 0, "start")
    assert record.restore_point() is None and record.rebuilt(None) == ""
    record.check(call(idempotency_key="k"))


def test_a_state_saved_after_the_last_step_is_restored_under_its_version() -> None:
    record = WeightState()
    answered(record, Kind.TRAIN_STEP, 4, 4)
    answered(record, Kind.SAVE, 4, 4, "four")
    point = record.restore_point()
    assert point == RestorePoint("four", 4) and record.rebuilt(point) == ""
    record.check(call(expected_step=4))
    with pytest.raises(StepConflict, match="no longer knows which idempotency keys .* give expected_step"):
        record.check(call(idempotency_key="k"))


def test_steps_after_the_last_state_are_lost_aloud_and_their_version_is_not_used_again() -> None:
    record = WeightState()
    answered(record, Kind.SAVE, 4, 4, "four")
    answered(record, Kind.TRAIN_STEP, 6, 6)
    point = record.restore_point()
    assert point == RestorePoint("four", 7)
    assert record.rebuilt(point) == "back at the state 'four', step 4: what was done to step 6 is lost"
    for kind in (Kind.TRAIN_STEP, Kind.FORWARD_BACKWARD, Kind.OPTIM_STEP, Kind.LOAD):
        with pytest.raises(StepConflict, match="is lost; ask GetTrainState where training stands"):
            record.check(call(kind, expected_step=4))
    for kind in (Kind.STATE, Kind.EVALUATE, Kind.SAVE, Kind.EXPORT):
        record.check(call(kind))
    answered(record, Kind.STATE, 4, 7)
    record.check(call(expected_step=4))
    assert record.restore_point() == RestorePoint("four", 7), "a second fault finds the state under its new version"


def test_steps_that_were_never_saved_are_not_given_up_for_the_checkpoint() -> None:
    record = WeightState()
    answered(record, Kind.OPTIM_STEP, 3, 3)
    with pytest.raises(WorkerError, match="3 training steps were never saved .* save states"):
        record.restore_point()


def test_a_loaded_state_counts_as_saved() -> None:
    record = WeightState()
    answered(record, Kind.TRAIN_STEP, 9, 9)
    answered(record, Kind.LOAD, 2, 10, "two")
    assert record.restore_point() == RestorePoint("two", 10)


def test_an_answer_that_is_told_again_changes_nothing() -> None:
    record = WeightState()
    answered(record, Kind.SAVE, 1, 1, "one")
    answered(record, Kind.TRAIN_STEP, 2, 2)
    answered(record, Kind.SAVE, 2, 2, "two")
    answered(record, Kind.SAVE, 1, 1, "one", replayed=True)
    answered(record, Kind.TRAIN_STEP, 1, 1, replayed=True)
    assert record.restore_point() == RestorePoint("two", 2)


def test_gradients_that_waited_are_lost_aloud() -> None:
    record = WeightState()
    answered(record, Kind.FORWARD_BACKWARD, 0, 0, waiting_calls=1)
    assert record.rebuilt(record.restore_point()) == "the weights are as they were; gradients that waited are lost"
    with pytest.raises(StepConflict, match="gradients that waited are lost; ask GetTrainState"):
        record.check(call(Kind.FORWARD_BACKWARD, idempotency_key="second", expected_step=0))


def test_a_call_that_names_the_memory_it_means_is_let_through_to_be_compared_there() -> None:
    record = WeightState()
    answered(record, Kind.FORWARD_BACKWARD, 0, 0, waiting_calls=1)
    record.rebuilt(record.restore_point())
    record.check(call(Kind.OPTIM_STEP, idempotency_key="k", expected_incarnation=5))


def test_gradients_that_were_applied_are_not_missed() -> None:
    record = WeightState()
    answered(record, Kind.FORWARD_BACKWARD, 0, 0)
    answered(record, Kind.OPTIM_STEP, 1, 1)
    answered(record, Kind.SAVE, 1, 1, "one")
    assert record.rebuilt(record.restore_point()) == ""
