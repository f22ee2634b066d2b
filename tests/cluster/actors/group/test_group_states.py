"""Every event in every stage of a group's life has an outcome, and none of them is an assertion."""

from __future__ import annotations

import itertools
import threading

import pytest

from cluster.actors.group.group_states import NEXT, Event, GroupState, Stage
from parallel.errors import WorkerError

WAYS: dict[Stage, list[Event]] = {
    Stage.NEW: [],
    Stage.STARTING: [Event.START],
    Stage.RUNNING: [Event.START, Event.READY],
    Stage.FAILED: [Event.START, Event.READY, Event.FAULT],
    Stage.REBUILDING: [Event.START, Event.READY, Event.FAULT, Event.REBUILD],
    Stage.CLOSED: [Event.CLOSE],
}


def at(stage: Stage) -> GroupState:
    life = GroupState()
    for event in WAYS[stage]:
        life.take(event, "first cause")
    assert life.stage is stage
    return life


@pytest.mark.parametrize(("stage", "event"), list(itertools.product(Stage, Event)))
def test_every_event_in_every_stage_leads_on_changes_nothing_or_is_refused_by_name(stage: Stage, event: Event) -> None:
    life, after = at(stage), NEXT[stage, event]
    if after is None:
        with pytest.raises(WorkerError, match=f"a group that is {stage.value} takes no order to {event.value}"):
            life.take(event)
        assert life.stage is stage
    else:
        assert life.take(event, "the cause") is (after is not stage) and life.stage is after


def test_only_orders_are_refused() -> None:
    assert {event for (_, event), after in NEXT.items() if after is None} == {Event.START, Event.REBUILD}


def test_the_first_cause_counts_until_the_group_runs_again() -> None:
    life = at(Stage.REBUILDING)
    assert life.wait_fault(0.0) == "first cause", "also while it is rebuilt"
    life.take(Event.FAULT, "rank 0 did not start")
    assert life.wait_fault(0.0) == "first cause"
    life.take(Event.REBUILD)
    life.take(Event.READY)
    assert life.wait_fault(0.0) is None


def test_a_group_that_works_but_cannot_be_used_is_rebuilt() -> None:
    life = at(Stage.RUNNING)
    assert life.take(Event.REBUILD) and life.stage is Stage.REBUILDING


def test_one_that_is_given_up_while_it_is_rebuilt_does_not_run() -> None:
    life = at(Stage.REBUILDING)
    life.take(Event.FAULT, "given up")
    life.take(Event.READY)
    assert life.stage is Stage.FAILED


def test_who_waits_for_a_fault_does_not_outlast_the_group() -> None:
    life = at(Stage.RUNNING)
    waiting = threading.Thread(target=life.wait_fault, args=(600.0,), daemon=True)
    waiting.start()
    life.take(Event.CLOSE)
    waiting.join(60)
    assert not waiting.is_alive()
