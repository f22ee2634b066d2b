"""Readiness follows canaries that were really sent: a late, a faulty and a lost one, and the next that succeeds."""

from __future__ import annotations

import asyncio
import signal
import threading
from functools import partial
from typing import Any

import pytest

from cluster.engine.request import EngineLoad
from cluster.frontend.frontend import Frontend, State
from cluster.frontend.readiness import Readiness
from cluster.link.local_link import LocalLink
from cluster.link.socket_link import SocketLink
from parallel.errors import WorkerError
from tests.cluster.frontend.fakes import FakeEngine
from tests.cluster.frontend.harness import run, serving, until
from tests.cluster.link.engine_process import engine_process

GENEROUS_S = 60.0


class SlowCanary(FakeEngine):
    """Its canaries wait until they are let go."""

    go = threading.Event()

    def prove(self) -> EngineLoad:
        assert self.go.wait(GENEROUS_S)
        return super().prove()


def test_a_server_is_not_ready_before_its_first_canary_and_after_a_late_one() -> None:
    async def main() -> None:
        engine = SlowCanary()
        engine.go.set()
        async with serving(engine) as frontend:
            readiness = Readiness(frontend, timeout_s=GENEROUS_S)
            seen: list[bool] = []
            readiness.observe(seen.append)
            assert not readiness.ready and "no canary" in readiness.reason
            assert await readiness.prove() and engine.canaries == 1
            engine.go.clear()
            readiness._timeout_s = 0.2
            assert not await readiness.prove()
            assert "did not come back" in readiness.reason and readiness.failures == 1
            engine.go.set()
            readiness._timeout_s = GENEROUS_S
            assert await readiness.prove()
            assert seen == [False, True, False, True]

    run(main())


def test_canaries_are_sent_again_and_again_and_at_once_when_a_new_engine_took_over() -> None:
    async def main() -> None:
        async with serving(FakeEngine(), recovery_seconds=10.0) as frontend:
            readiness = Readiness(frontend, every_s=0.05)
            task = asyncio.create_task(readiness.run())
            first: Any = frontend.fleet.replicas[0].link
            await until(lambda: first._engine.canaries >= 3)
            assert readiness.ready
            frontend.fault("rank 1 is gone")
            assert not readiness.ready and readiness.reason == "the server is recovering"
            readiness._every_s, new = 60.0, FakeEngine()
            await asyncio.sleep(0.1)
            await frontend.reattach(LocalLink(new))
            await until(lambda: readiness.ready)
            assert new.canaries == 1, "at once, though the next one was not due"
            task.cancel()

    run(main())


def test_a_training_call_under_way_excuses_a_late_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = SlowCanary()
        engine.go.set()
        async with serving(engine) as frontend:
            readiness = Readiness(frontend, timeout_s=GENEROUS_S)
            assert await readiness.prove()
            engine.go.clear()
            readiness._timeout_s = 0.2
            monkeypatch.setattr(Frontend, "training_under_way", True)
            assert await readiness.prove(), "busy by right"
            monkeypatch.setattr(Frontend, "training_under_way", False)
            assert not await readiness.prove()
            engine.go.set()

    run(main())


def test_a_question_under_way_ends_with_the_connection_not_with_its_own_limit() -> None:
    async def main() -> None:
        with engine_process() as process:
            link: SocketLink = process.link()
            frontend = Frontend(link)
            frontend.start()
            process.signal(signal.SIGSTOP)
            asked = asyncio.create_task(frontend.load(3600.0, prove=True))
            await asyncio.sleep(0.2)
            process.signal(signal.SIGKILL)
            with pytest.raises(WorkerError, match="lost"):
                await asked
            assert frontend.state is State.FAILED
            await frontend.close()

    run(main())


def test_an_engine_that_is_asked_all_the_time_is_kept_alive_all_the_same() -> None:
    """Other ranks give up on a rank 0 that is silent, also where somebody asks it for its load ten times a second."""

    async def main() -> None:
        engine = FakeEngine()
        async with serving(engine) as frontend:
            for _ in range(20):
                await frontend.load()
                await asyncio.sleep(0.02)
        assert engine.kept_alive >= 10

    run(main())


def _note(condemned: list[tuple[int, str]], replica: int, cause: str) -> None:
    condemned.append((replica, cause))


def test_an_engine_that_hangs_is_condemned_after_two_canaries_and_one_that_says_something_is_not() -> None:
    async def main() -> None:
        engine = SlowCanary()
        async with serving(engine) as frontend:
            condemned: list[tuple[int, str]] = []
            readiness = Readiness(frontend, timeout_s=0.05, condemn=partial(_note, condemned))
            seat = frontend.fleet.replicas[0].seat
            assert seat is not None
            engine.go.clear()
            await readiness.prove()
            seat.heard = float("inf")  # its events come, however late its canaries are
            await readiness.prove()
            await readiness.prove()
            assert condemned == [] and not readiness.ready
            seat.heard = 0.0
            await readiness.prove()
            await readiness.prove()
            assert [replica for replica, _ in condemned] == [0] and "its engine hangs: 2 canaries" in condemned[0][1]
            engine.go.set()

    run(main())


def test_one_that_was_right_and_is_wrong_twice_is_condemned_one_that_was_never_right_is_not() -> None:
    async def main() -> None:
        for right_first in (True, False):
            engine = FakeEngine()
            async with serving(engine) as frontend:
                condemned: list[tuple[int, str]] = []
                readiness = Readiness(frontend, condemn=partial(_note, condemned))
                if right_first:
                    assert await readiness.prove()
                engine.canary_fault = "nonsense"
                for _ in range(3):
                    await readiness.prove()
                assert [replica for replica, _ in condemned] == ([0] if right_first else [])

    run(main())
