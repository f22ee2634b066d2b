"""One call of very many prompts: the event loop has turns for others all the while."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cluster.engine.request import ResponseOptions, SamplingParams, StoppingCriteria
from cluster.frontend.frontend import Frontend
from tests.cluster.frontend.fakes import FakeEngine
from tests.cluster.frontend.harness import call, run, serving

MANY = 512
ONE_NEW = StoppingCriteria(max_new_tokens=1)


async def turns(work: Awaitable[Any]) -> int:
    """How often another task had the loop before this one was done."""
    done = asyncio.ensure_future(work)
    count = 0
    while not done.done():
        await asyncio.sleep(0)
        count += 1
    await done
    return count


@pytest.mark.parametrize(
    ("begin", "least"),
    [
        (lambda f: f.tokenize(["ab" * 200] * MANY), MANY),
        (lambda f: f.tokenize(["ab"] * MANY), MANY // 16),
        (lambda f: f.open(call(*["ab " * 50] * MANY, stopping=ONE_NEW)), MANY),
        (lambda f: f.open(call(*[[1, 2]] * MANY, stopping=ONE_NEW)), MANY // 16 + MANY // 64),
        (lambda f: f.open(call(*["ab"] * MANY, stopping=ONE_NEW, sampling=SamplingParams(n=4))), MANY // 16),
    ],
)
def test_others_have_turns(begin: Callable[[Frontend], Awaitable[Any]], least: int) -> None:
    async def main() -> None:
        async with serving(FakeEngine()) as frontend:
            assert await turns(begin(frontend)) >= least - 8

    run(main())


def test_echoed_text_is_made_when_a_prompt_is_answered_and_once_for_its_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        async with serving(FakeEngine()) as frontend:
            assert frontend.codec is not None
            made: list[int] = []
            decode = frontend.codec.tokenizer.decode

            def counted(ids: Any) -> str:
                made.append(len(ids))
                return decode(ids)

            monkeypatch.setattr(frontend.codec.tokenizer, "decode", counted)
            echo = ResponseOptions(echo=True)
            asked = call([0, 1], [2], sampling=SamplingParams(seed=1, n=3), response=echo, stopping=ONE_NEW)
            stream = await frontend.open(asked)
            assert not made
            texts = [chunk.text async for chunk in stream]
            assert sorted(made) == [1, 2] and sum(text.startswith("ab") for text in texts) >= 3

    run(main())
