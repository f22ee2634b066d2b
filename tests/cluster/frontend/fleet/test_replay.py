"""A front-end that dies, and the one after it: what was open goes on, what was answered is answered again, and every
retry gets the very answer it would have got. The engines are fakes, the ledger is real."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.engine.request import FinishReason, ResponseOptions, SamplingParams, StoppingCriteria
from cluster.frontend.frontend import Frontend
from cluster.frontend.ledger.request_ledger import Ledger, LedgerConfig
from cluster.frontend.output.streams import Result, Stream, collect
from cluster.frontend.requests.call import Call, FrontendConfig
from cluster.link.local_link import LocalLink
from cluster.request_errors import DuplicateRequest, RequestIdReused
from parallel.errors import TpError
from tests.cluster.frontend.fakes import CODEC, FakeEngine, tokens_of
from tests.cluster.frontend.fleet.test_engine_death import essence, random_call
from tests.cluster.frontend.harness import answer, call, run, until


class Server:
    """A front-end with its ledger."""

    def __init__(self, folder: Path, engine: FakeEngine | None = None, **config: float) -> None:
        self.engine = engine or FakeEngine()
        self.ledger = Ledger(folder, "model", LedgerConfig(**config))  # type: ignore[arg-type]
        self.frontend = Frontend(
            LocalLink(self.engine), codec=CODEC, config=FrontendConfig(recovery_seconds=20.0), ledger=self.ledger
        )
        self.frontend.start()

    async def killed(self) -> None:
        """Its memory and its readers are gone; what it had written is what there is."""
        self.frontend._delivery.ledger = None
        self.ledger._items.clear()
        self.ledger.close()
        await self.frontend.close()

    async def close(self) -> None:
        await self.frontend.close()
        self.ledger.close()


@asynccontextmanager
async def server(folder: Path, engine: FakeEngine | None = None, **config: float) -> AsyncIterator[Server]:
    made = Server(folder, engine, **config)
    try:
        yield made
    finally:
        await made.close()


def named(asked: Call, name: str = "one", caller: str = "alice") -> Call:
    return replace(asked, request_id=name, caller=caller)


LONG = named(call([1, 2], stopping=StoppingCriteria(max_new_tokens=200)))


async def begun(stream: Stream, tokens: int) -> list[int]:
    """Reads the stream until so many tokens have come."""
    seen: list[int] = []
    while len(seen) < tokens:
        seen += (await anext(stream)).token_ids
    return seen


async def undisturbed(calls: list[Call]) -> list[list[object]]:
    frontend = Frontend(LocalLink(FakeEngine()), codec=CODEC)
    frontend.start()
    expected = [essence(await answer(frontend, replace(asked, request_id=""))) for asked in calls]
    await frontend.close()
    return expected


async def persistent(get: list[Frontend], asked: Call) -> list[Result]:
    """A client: asks the present front-end again until it has the whole answer."""
    while True:
        try:
            results = await answer(get[0], asked)
        except TpError:
            await asyncio.sleep(0.01)
            continue
        if all(s.finish_reason is not FinishReason.ABORTED for r in results for s in r.samples.values()):
            return results


def test_retries_over_front_ends_that_die_again_and_again_get_the_undisturbed_answers(tmp_path: Path) -> None:
    async def main() -> None:
        rng = random.Random(3)
        calls = [named(random_call(rng), str(i)) for i in range(40)]
        calls += [named(call([3, 4], score=True, response=ResponseOptions(prompt_logprobs=1)), "score")]
        calls += [named(call([3, 99], [5], response=ResponseOptions(echo=True)), "one prompt is refused")]
        expected = await undisturbed(calls)
        present = Server(tmp_path / "s", FakeEngine(step_seconds=0.003))
        current = [present.frontend]
        tasks = [asyncio.create_task(persistent(current, asked)) for asked in calls]
        for _ in range(6):
            await asyncio.sleep(rng.uniform(0.005, 0.03))
            await present.killed()
            present = Server(tmp_path / "s", FakeEngine(step_seconds=0.003))
            current[0] = present.frontend
        assert [essence(await task) for task in tasks] == expected
        await until(lambda: present.frontend.num_open == 0)
        again = FakeEngine()
        await present.close()
        async with server(tmp_path / "s", again) as last:
            assert [essence(await answer(last.frontend, asked)) for asked in calls] == expected
            assert again.submitted == 0, "nothing was computed for answers that were known"

    run(main())


def test_an_open_call_goes_on_without_its_reader_who_gets_it_all_later(tmp_path: Path) -> None:
    async def main() -> None:
        first = Server(tmp_path / "s", FakeEngine(step_seconds=0.008))
        seen = await begun(await first.frontend.open(LONG), 20)
        await first.killed()
        async with server(tmp_path / "s", FakeEngine(step_seconds=0.008)) as second:
            assert second.frontend.num_open == 1
            await until(lambda: second.engine.steps > 10)
            results = await answer(second.frontend, LONG)
            tokens = results[0].samples[0].token_ids
            assert tokens == tokens_of([1, 2], 1, 0, 200) and tokens[: len(seen)] == seen
            assert second.engine.submitted == 1

    run(main())


def test_without_a_reader_it_ends_in_time_and_a_later_retry_takes_it_up(tmp_path: Path) -> None:
    async def main() -> None:
        first = Server(tmp_path / "s", FakeEngine(step_seconds=0.01))
        await begun(await first.frontend.open(LONG), 5)
        await first.killed()
        async with server(tmp_path / "s", FakeEngine(step_seconds=0.01), orphan_seconds=0.1) as second:
            await until(lambda: second.frontend.num_open == 0)
            await until(lambda: second.engine.idle)
            (result,) = await answer(second.frontend, LONG)
            assert result.samples[0].token_ids == tokens_of([1, 2], 1, 0, 200)
            assert second.engine.submitted == 2, "it went on from where it was set aside"

    run(main())


def test_a_reader_that_leaves_and_comes_back_gets_the_same_drawn_answer(tmp_path: Path) -> None:
    async def main() -> None:
        asked = replace(LONG, sampling=SamplingParams())  # the server draws the seed
        async with server(tmp_path / "s", FakeEngine(step_seconds=0.008)) as only:
            stream = await only.frontend.open(asked)
            seen = await begun(stream, 10)
            stream.close()
            await until(lambda: only.engine.idle)
            (result,) = await answer(only.frontend, asked)
            assert result.samples[0].token_ids[: len(seen)] == seen and len(result.samples[0].token_ids) == 200

    run(main())


def test_ids_are_each_caller_s_own(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path / "s", FakeEngine(step_seconds=0.008)) as only:
            drawn = replace(LONG, sampling=SamplingParams())
            mine = await only.frontend.open(drawn)
            with pytest.raises(DuplicateRequest):
                await only.frontend.open(drawn)
            other = await answer(only.frontend, replace(drawn, caller="bob"))
            (own,) = await collect(mine, 1)
            assert own.samples[0].token_ids != other[0].samples[0].token_ids
            with pytest.raises(RequestIdReused, match="asked something else"):
                await only.frontend.open(replace(drawn, prompts=call([9]).prompts))
            assert essence(await answer(only.frontend, drawn)) == essence([own])

    run(main())


def test_what_somebody_aborted_is_a_new_call_when_it_is_asked_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path / "s", FakeEngine(step_seconds=0.008)) as only:
            drawn = replace(LONG, sampling=SamplingParams())
            stream = await only.frontend.open(drawn)
            seen = await begun(stream, 8)
            assert only.frontend.abort([drawn.request_id]) == 1
            (result,) = await answer(only.frontend, drawn)
            assert len(result.samples[0].token_ids) == 200 and result.samples[0].token_ids[:8] != seen[:8]

    run(main())


def test_a_call_without_an_id_is_not_written_down(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path / "s") as only:
            await answer(only.frontend, call([1, 2]))
            assert len(only.ledger) == 0

    run(main())


def test_a_deadline_that_passed_is_no_answer(tmp_path: Path) -> None:
    async def main() -> None:
        async with server(tmp_path / "s", FakeEngine(step_seconds=0.01)) as only:
            (late,) = await answer(only.frontend, replace(LONG, deadline=0.1))
            assert late.samples[0].finish_reason is FinishReason.DEADLINE
            (result,) = await answer(only.frontend, replace(LONG, deadline=60.0))
            assert result.samples[0].token_ids == tokens_of([1, 2], 1, 0, 200)

    run(main())
