"""Speculation changes nothing: tokens, log-probabilities, ends, of every kind of request, whatever is proposed.

`make speculate` compares 10^4 requests: SPECULATION_CASES a family.
"""

from __future__ import annotations

import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engine.engine import generate
from cluster.engine.engine_config import EngineConfig, SpeculationConfig
from cluster.engine.request import EngineLoad, Request, SamplingParams, StoppingCriteria
from parallel.errors import ConfigError
from tests.cluster.engine.fake_executor import VOCAB, Clock, fake_engine, next_token, reference
from tests.cluster.engine.speculate.speculation_cases import (
    DRAFTERS,
    EAGER,
    SCENES,
    Absurd,
    compare,
    compare_on,
    drawn_request,
)
from tests.cluster.engine.test_random_walks import Walk, wander
from tests.cluster.engine.tiny_models import CONFIGS, save_tiny
from tp_decoders import load

FAMILIES = list(CONFIGS)
CASES = int(os.environ.get("SPECULATION_CASES", "12"))
TOGETHER = 24
"""Requests of one batch."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More would wait for each other: the models are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_are_those_of_plain_decoding(family: str, tmp_path: Path) -> None:
    model, seen = load(str(save_tiny(family, tmp_path))), Counter[str]()
    first = FAMILIES.index(family) * CASES
    for batch, number in enumerate(range(first, first + CASES, TOGETHER)):
        requests = [drawn_request(each) for each in range(number, min(first + CASES, number + TOGETHER))]
        scene = list(SCENES)[(FAMILIES.index(family) + batch) % len(SCENES)]
        loads = compare(model, None, scene, requests, list(DRAFTERS))
        for name, load_of in loads.items():
            seen[f"{name}, drafted"] += load_of.draft_tokens
            seen[f"{name}, accepted"] += load_of.accepted_draft_tokens
            seen[f"{name}, preempted"] += load_of.preemptions
        check(loads)
    print(family, dict(seen))


def check(loads: dict[str, EngineLoad]) -> None:
    """That the drafters are what they are called."""
    right, mostly, wrong = loads["always right"], loads["mostly right"], loads["always wrong"]
    assert right.accepted_draft_tokens > 0.9 * right.draft_tokens > 5 and right.steps <= loads["off"].steps
    assert 0 < mostly.accepted_draft_tokens < mostly.draft_tokens
    assert wrong.draft_tokens > 10 * wrong.accepted_draft_tokens
    assert (loads["off"].draft_tokens, loads["off"].drafts) == (0, 0)


def test_streams_are_those_of_plain_decoding_on_two_ranks(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    loads = ranks(2, compare_on, str(save_tiny("gpt_neox", tmp_path)), "plain", 8, limit=120.0)[0]
    assert loads["mostly right"].accepted_draft_tokens > 10


# ---------------------------------------------------------------------------------- one sequence, drawn by a function


class Oracle:
    """Proposes what the fake executor will say, each token wrong with a probability."""

    def __init__(self, wrong: float = 0.0) -> None:
        self._wrong, self._rng = wrong, random.Random(3)

    def propose(self, seq: Any, most: int) -> list[int]:
        tokens = list(seq.tokens)
        for _ in range(most):
            banned = seq.stop_ids if len(tokens) < seq.min_tokens else frozenset()
            token = next_token(tokens, 0 if seq.plain and not banned else seq.stream, banned)
            tokens.append(self._rng.randrange(VOCAB) if self._rng.random() < self._wrong else token)
        return tokens[len(seq.tokens) :]

    def ended(self, seq: Any) -> None:
        pass


def ask(name: str, prompt: int = 3, new: int = 30, **sampling: Any) -> Request:
    return Request(
        request_id=name, token_ids=tuple(range(8, 8 + prompt)), sampling=SamplingParams(temperature=0.0, **sampling),
        stopping=StoppingCriteria(max_new_tokens=new, ignore_eos=True),
    )  # fmt: skip


def answered(drafter: Any, requests: list[Request], **sizes: Any) -> tuple[EngineLoad, Any]:
    """Each answer is the reference's; the engine's counters, and its executor."""
    engine, executor = fake_engine(**{"num_blocks": 64, "speculation": EAGER, **sizes})
    engine.scheduler.speculator.drafter = drafter
    for request, (result,) in zip(requests, generate(engine, requests), strict=True):
        assert (result.token_ids, result.finish_reason) == reference(request, 0)
    engine.scheduler.residents.check()
    return engine.load(), executor


def test_a_right_draft_saves_a_step_a_token() -> None:
    counted, _ = answered(Oracle(), [ask("a")])
    assert counted.accepted_draft_tokens == counted.draft_tokens == 30 - counted.steps
    assert counted.steps <= 6 and counted.generated_tokens == 30


@pytest.mark.parametrize("seed", range(6))
def test_random_walks_lose_nothing_and_change_nothing_with_drafts(seed: int) -> None:
    walk = Walk(1000 + seed, speculation=EAGER)
    walk.engine.scheduler.speculator.drafter = Oracle(wrong=0.15)
    wander(walk)
    counted = walk.engine.load()
    assert 20 < counted.accepted_draft_tokens < counted.draft_tokens


def test_a_request_may_do_without() -> None:
    counted, _ = answered(Oracle(), [ask("a", no_speculation=True), ask("b", no_repeat_ngram_size=2)][:1])
    assert counted.draft_tokens == 0 and counted.steps == 30


def test_no_draft_reaches_beyond_the_last_token_or_the_cache() -> None:
    _, executor = answered(Oracle(), [ask("a", prompt=3, new=30)], num_blocks=8, block_size=4)  # 32 places, all needed
    assert max(length for plan in executor.plans for length in plan.context_lens) == 32


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_a_step_has_no_more_rows_than_it_may(rows: int) -> None:
    few = replace(EAGER, max_rows=rows)
    requests = [ask(f"r{i}", new=12 + 5 * i) for i in range(5)]
    _, executor = answered(Oracle(), requests, speculation=few, max_step_tokens=40)
    drafting = [plan for plan in executor.plans if len(plan.rows) > len(plan.slots)]
    assert drafting and all(len(plan.tokens) <= rows for plan in drafting)
    assert all(len(plan.slots) < rows for plan in drafting), "a full step brings none"


def test_text_that_does_not_repeat_costs_a_wrong_row_now_and_then() -> None:
    class Wrong(Oracle):
        def propose(self, seq: Any, most: int) -> list[int]:
            return [(token + 1) % 50 for token in super().propose(seq, most)]

    counted, _ = answered(Wrong(), [ask("a", new=60)], num_blocks=64)
    assert counted.accepted_draft_tokens == 0 and counted.steps == 60 and counted.drafts <= 6


def test_what_is_no_token_is_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        answered(Absurd(), [ask(f"r{i}") for i in range(3)])
    assert len(caplog.records) == 1 and "the drafter Absurd" in caplog.text


def test_deadlines_and_aborts_end_a_sequence_between_two_drafts() -> None:
    clock = Clock()
    engine, _ = fake_engine(64, clock, speculation=EAGER)
    engine.scheduler.speculator.drafter = Oracle()
    engine.submit(replace(ask("late"), deadline=1.0))
    engine.submit(ask("gone"))
    told: dict[str, list[int]] = {"late": [], "gone": []}
    for step in range(4):
        clock.now = step * 0.6
        engine.abort(["gone"] if step == 2 else [])
        for event in engine.step():
            told[event.request_id] += event.token_ids
    assert engine.idle and engine.load().kv_blocks_free == 64
    for name, tokens in told.items():
        assert len(tokens) > 2 and tokens == reference(ask(name), 0)[0][: len(tokens)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_speculative_tokens", 0), ("prompt_lookup_min", 0), ("max_rows", 1), ("recent_tokens", -1)],
)
def test_sizes_that_mean_nothing_are_refused(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"speculation\.{field} is {value}; it must be a whole number of at least"):
        SpeculationConfig(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"speculation\.method is 'magic'; choose off or ngram"):
        SpeculationConfig(method="magic")  # type: ignore[arg-type]
    assert EngineConfig().speculation.method == "off"
