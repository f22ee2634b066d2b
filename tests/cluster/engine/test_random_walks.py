"""Thousands of random submissions, aborts and deadlines over tiny caches: nothing is lost, leaked or changed.

Each walk prints its seed; set SEEDS to that one to see it again.
"""

from __future__ import annotations

import random

import pytest

from cluster.engine.engine import Engine
from cluster.engine.request import (
    FinishReason,
    Request,
    ResponseOptions,
    SamplingParams,
    Share,
    StoppingCriteria,
    TokenEvent,
)
from parallel.errors import CapacityError
from tests.cluster.engine.fake_executor import VOCAB, Clock, fake_engine, logprob_of, reference

SEEDS = range(24)
STEPS = 400


class Walk:
    """One engine under random load, and what must be true of it."""

    def __init__(self, seed: int, **more: object) -> None:
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.config = {
            "block_size": self.rng.choice([1, 2, 3, 4, 16]),
            "max_sequences": self.rng.choice([1, 3, 8]),
            "max_step_tokens": self.rng.choice([8, 13, 40]),
            "max_scored_tokens": self.rng.choice([1, 5, 40]),
            "prefix_caching": self.rng.random() < 0.7,
        }
        num_blocks = -(-self.rng.choice([20, 40, 90]) // int(self.config["block_size"]))
        self.engine, self.executor = fake_engine(num_blocks, self.clock, **self.config, **more)
        self.num_blocks = num_blocks
        self.asked: dict[str, Request] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], FinishReason] = {}
        self.scores: dict[str, list[float]] = {}
        self.submitted = 0
        names = [Share("a"), Share("b", weight=3.0), Share("address", "1"), Share("address", "2")]
        self.shares = names[: self.rng.choice([1, 2, 4])]
        self.prefixes = [[self.rng.randrange(VOCAB) for _ in range(40)] for _ in range(2)]

    def request(self) -> Request:
        rng = self.rng
        length = rng.choice([1, 2, 5, 17, 30])
        prompt = (rng.choice(self.prefixes)[: length - 1] if rng.random() < 0.6 else []) or []
        prompt = prompt + [rng.randrange(VOCAB) for _ in range(length - len(prompt))]
        new = rng.choice([None, 1, 3, 10, 25])
        minimum = rng.randrange(new) if new and rng.random() < 0.3 else 0
        self.submitted += 1
        return Request(
            request_id=f"r{self.submitted}",
            token_ids=tuple(prompt),
            sampling=SamplingParams(
                temperature=rng.choice([0.0, 1.0]), n=rng.choice([1, 1, 1, 2, 3]), seed=rng.randrange(99)
            ),
            stopping=StoppingCriteria(
                max_new_tokens=new,
                min_new_tokens=minimum,
                ignore_eos=rng.random() < 0.5,
                stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 2]))),
                include_stop_sequence=rng.random() < 0.5,
            ),
            response=ResponseOptions(prompt_logprobs=rng.choice([None, None, 0, 2])),
            priority=rng.choice([0, 0, 0, 1, -1]),
            deadline=rng.choice([None, None, None, 5.0, 60.0]),
            score_only=rng.random() < 0.1,
            share=rng.choice(self.shares),
        )

    def submit(self) -> None:
        request = self.request()
        try:
            resolved = self.engine.submit(request)
        except CapacityError:
            return
        self.asked[request.request_id] = resolved

    def abort(self) -> None:
        alive = list(self.engine.scheduler.answers)
        if not alive:
            return
        name = self.rng.choice(alive)
        if self.rng.random() < 0.5:
            self.engine.abort([name])
        else:
            self.engine.abort_samples([(name, self.rng.randrange(self.asked[name].sampling.n))])

    def step(self) -> None:
        plans = len(self.executor.plans)
        self.take(self.engine.step())
        self.clock.now += self.rng.random()
        self.engine.scheduler.residents.check()
        for plan in self.executor.plans[plans:]:
            assert len(plan.tokens) <= int(self.config["max_step_tokens"])
            assert len(set(plan.slots)) == len(plan.slots) <= int(self.config["max_sequences"])
        self.executor.plans.clear()

    def take(self, events: list[TokenEvent]) -> None:
        for event in events:
            key = (event.request_id, event.sample_index)
            assert key not in self.ends, f"{key} goes on after its end"
            self.tokens.setdefault(key, []).extend(event.token_ids)
            if event.prompt_logprobs is not None:
                assert event.request_id not in self.scores, "prompt log-probabilities came twice"
                self.scores[event.request_id] = [entry.logprob for entry in event.prompt_logprobs]
            if event.finish_reason is not None:
                self.ends[key] = event.finish_reason

    def finish(self) -> None:
        for _ in range(5000):
            if self.engine.idle:
                break
            self.step()
        assert self.engine.idle, "the engine does not come to an end"
        load = self.engine.load()
        assert (load.kv_blocks_free, load.running, load.waiting) == (self.num_blocks, 0, 0)
        assert not self.engine.scheduler.queue._flows, "a caller without requests is still there"
        for request in self.asked.values():
            self.check(request)

    def check(self, request: Request) -> None:
        name, ids = request.request_id, request.token_ids
        expected = [logprob_of(ids[:i], ids[i]) for i in range(1, len(ids))]
        ended = [self.ends[name, index] for index in range(1 if request.score_only else request.sampling.n)]
        complete = all(end in (FinishReason.STOP, FinishReason.LENGTH) for end in ended)
        if name in self.scores:
            assert self.scores[name] == expected
        elif complete:
            assert not request.score_only and request.response.prompt_logprobs is None
        for index, end in enumerate([] if request.score_only else ended):
            tokens, reason = reference(request, index)
            got = self.tokens[name, index]
            if end in (FinishReason.STOP, FinishReason.LENGTH):
                assert (got, end) == (tokens, reason)
            else:
                assert end in (FinishReason.ABORTED, FinishReason.DEADLINE) and got == tokens[: len(got)]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_walks_lose_nothing_and_change_nothing(seed: int) -> None:
    print(f"walk seed {seed}")
    wander(Walk(seed))


def wander(walk: Walk) -> None:
    for _ in range(STEPS):
        for _ in range(walk.rng.choice([0, 0, 1, 3])):
            walk.submit()
        if walk.rng.random() < 0.1:
            walk.abort()
        walk.step()
    walk.finish()
    assert walk.submitted > 100 and len(walk.ends) > 100


def admissions(engine: Engine, names: list[str]) -> list[str]:
    """The order in which requests produce their first token."""
    seen: list[str] = []
    while not engine.idle:
        for event in engine.step():
            if event.token_ids and event.request_id in names and event.request_id not in seen:
                seen.append(event.request_id)
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_equal_requests_start_in_the_order_of_arrival_even_when_preempted(seed: int) -> None:
    print(f"fairness seed {seed}")
    rng = random.Random(seed)
    engine, _ = fake_engine(num_blocks=16, max_sequences=6)
    names = [f"r{i}" for i in range(40)]
    for name in names:
        prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 25)))
        stopping = StoppingCriteria(max_new_tokens=rng.randrange(1, 30), ignore_eos=True)
        engine.submit(
            Request(request_id=name, token_ids=prompt, sampling=SamplingParams(temperature=0.0), stopping=stopping)
        )
    starts = admissions(engine, names)
    assert sorted(starts) == sorted(names) and engine.load().preemptions > 0
    places = {name: starts.index(name) for name in names}
    overtakers = [sum(places[b] < places[a] for b in names[i + 1 :]) for i, a in enumerate(names)]
    assert max(overtakers) < 6, "more than a batch of later arrivals started before an earlier one"
