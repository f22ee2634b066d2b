"""What runs beside the main path never ends in silence."""

from __future__ import annotations

import asyncio

import pytest

from cluster import supervision
from cluster.supervision import Patience, kept_up, supervised


def test_what_a_thread_raises_reaches_its_owner() -> None:
    told: list[Exception] = []
    thread = supervised("test", lambda: [][0], told.append)
    thread.join(60)
    assert [type(error) for error in told] == [IndexError]


def test_a_task_that_raises_is_begun_again_until_it_ends_or_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "FIRST_PAUSE_S", 0.001)
    runs = [0]

    async def work() -> None:
        runs[0] += 1
        if runs[0] < 3:
            raise KeyError("nobody thought of it")

    asyncio.run(asyncio.wait_for(kept_up("test", work), 60))
    assert runs == [3]


def test_patience_doubles_its_pauses_ends_and_begins_again_after_a_success() -> None:
    now = [0.0]
    patience = Patience(4.0, lambda: now[0])
    pauses = []
    while (pause := patience.pause()) is not None:
        pauses.append(pause)
        now[0] += pause
    assert pauses == [0.5, 1.0, 2.0, 4.0] and now[0] >= 4.0
    patience.reset()
    assert patience.pause() == 0.5
