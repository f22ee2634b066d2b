"""Work beside the event loop: a caller's pieces one by one, others' meanwhile, and the loop goes on."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.frontend.requests.classify_embed import Span, best_spans, softmax
from cluster.frontend.requests.offload import FairThreadPool
from cluster.link.engine_loop import EngineLoop
from tests.cluster.frontend.fakes import FakeEngine
from tests.cluster.frontend.harness import run
from tp_decoders.text.tokenizer import LONG_CHARACTERS, load_tokenizer

TOKENIZERS = Path(__file__).parents[3] / "data/tokenizers"


def test_one_caller_has_one_piece_at_a_time_and_holds_up_nobody_else() -> None:
    async def main() -> None:
        pool, running, most = FairThreadPool(), 0, 0
        gate = threading.Event()

        def piece() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            gate.wait(60)
            running -= 1

        mine = [asyncio.create_task(pool.run("many", piece)) for _ in range(20)]
        await asyncio.sleep(0.05)
        assert await pool.run("one", lambda: "done") == "done", "the second thread is for others"
        for task in mine[:10]:
            task.cancel()
        await asyncio.sleep(0.05)
        assert running == 1, "a piece that nobody waits for any more still counts"
        gate.set()
        await asyncio.gather(*mine, return_exceptions=True)
        assert most == 1 and not pool._last
        with pytest.raises(ZeroDivisionError):
            await pool.run("one", lambda: 1 // 0)
        pool.close()

    run(main())


def longest_pause(work: threading.Thread) -> float:
    """How long this thread stood still while another one worked."""
    work.start()
    beats = [time.monotonic()]
    while work.is_alive():
        time.sleep(0.001)
        beats.append(time.monotonic())
    return max(b - a for a, b in pairwise(beats))


def test_tokenizing_a_long_text_lets_the_interpreter_go() -> None:
    tokenizer = load_tokenizer(str(TOKENIZERS / "gpt-neox-20b"))
    assert tokenizer is not None
    text, ids = "\u3042" * (1 << 19), []
    began = time.monotonic()
    pause = longest_pause(threading.Thread(target=lambda: ids.extend(tokenizer.encode(text))))
    took = time.monotonic() - began
    print(f"{len(text)} characters in {took:.2f} s, others stood still for {pause:.3f} s")
    assert pause < took / 2 and len(ids) > 1000


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b"])
def test_a_long_text_has_the_tokens_that_a_short_one_has(name: str) -> None:
    tokenizer = load_tokenizer(str(TOKENIZERS / name))
    assert tokenizer is not None
    rng, words = random.Random(1), ["the", " cat", "\n", "日本", " <|endoftext|>", "  ", "é", "123"]
    for _ in range(5):
        text = "".join(rng.choice(words) for _ in range(LONG_CHARACTERS))
        assert len(text) > LONG_CHARACTERS
        assert tokenizer.encode(text) == list(tokenizer.vocabulary._tokenizer.encode(text).ids)  # type: ignore[attr-defined]


def slow_spans(rows: list[tuple[float, float]], count: int, most: int) -> list[Span]:
    """By its definition."""
    starts, ends = softmax([row[0] for row in rows]), softmax([row[1] for row in rows])
    places = [(i, j) for i in range(len(rows)) for j in range(i, min(len(rows), i + most))]
    places.sort(key=lambda place: (-starts[place[0]] * ends[place[1]], *place))
    return [Span(i, j, starts[i] * ends[j]) for i, j in places[:count]]


@pytest.mark.parametrize(("count", "most"), [(1, 1), (3, 4), (100, 30), (100, 4294967295)])
def test_the_best_spans_are_those_of_the_definition_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, count: int, most: int
) -> None:
    monkeypatch.setattr("cluster.frontend.requests.classify_embed.SPANS_AT_ONCE", 64)
    rng = random.Random(count)
    for length in (1, 2, 17, 60):
        rows = [(rng.gauss(0, 1), rng.gauss(0, 1)) for _ in range(length)]
        assert best_spans(rows, count, most) == slow_spans(rows, count, most)
        level = [(float(rng.randrange(2)), 0.0) for _ in range(length)]  # of equals the earliest
        assert best_spans(level, count, most) == slow_spans(level, count, most)


def test_many_requests_at_once_do_not_keep_a_step_waiting() -> None:
    from cluster.engine.request import Request, StoppingCriteria

    taken: list[int] = []

    class Counting(FakeEngine):
        def submit(self, request: Request) -> Request:
            time.sleep(0.001)
            return super().submit(request)

        def step(self) -> list:  # type: ignore[type-arg]
            taken.append(self.submitted)
            return super().step()

    engine = Counting()
    loop = EngineLoop(engine, lambda events: None)
    stopping = StoppingCriteria(max_new_tokens=200)
    loop.submit([Request(request_id=str(i), token_ids=(1,), stopping=stopping) for i in range(400)])
    thread = threading.Thread(target=loop.run)
    thread.start()
    while engine.submitted < 400:
        time.sleep(0.01)
    loop.stop()
    thread.join(60)
    assert max(b - a for a, b in pairwise([0, *taken[:8]])) <= 64
