"""Callers share an engine by weight, whatever one of them sends: who starts, who is computed, who gives way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.engine.engine import Engine, generate
from cluster.engine.request import BeamParams, Request, SamplingParams, Share, StoppingCriteria
from cluster.engine.schedule.fair_share import MAX_REMEMBERED, FairQueue
from cluster.engine.schedule.preemption import LEAST_QUANTUM, QUANTUM
from cluster.engine.schedule.step_planner import divided
from cluster.engine.schedule.step_time import StepTime
from cluster.engine.sequences.caller_flows import Caller, Flow
from cluster.engine.sequences.sequence import Sequence
from tests.cluster.engine.beams.beam_cases import SEARCHES, engine_over
from tests.cluster.engine.fake_executor import Clock, fake_engine, reference
from tests.cluster.engine.tiny_models import save_tiny

GOOD, EVIL = Share("good"), Share("evil")


def ask(name: str, share: Share, *, prompt: int = 4, new: int = 30, **fields: object) -> Request:
    sampling = fields.pop("sampling", SamplingParams(temperature=0.0))
    return Request(
        request_id=name, token_ids=tuple(8 + i % 40 for i in range(prompt)), sampling=sampling, share=share,  # type: ignore[arg-type]
        stopping=StoppingCriteria(max_new_tokens=new, ignore_eos=True), **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def steps_to_first_token(engine: Engine, name: str, most: int = 200) -> int:
    for step in range(1, most):
        if any(event.request_id == name and event.token_ids for event in engine.step()):
            return step
    raise AssertionError(f"{name} has no token after {most} steps")


def finish(engine: Engine, requests: list[Request]) -> None:
    """To the end; every answer is the undisturbed one."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while not engine.idle:
        for event in engine.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
        engine.scheduler.residents.check()
    for request in requests:
        assert tokens[request.request_id] == reference(request, 0)[0]


@pytest.mark.parametrize("priority", [0, -1_000_000])
def test_a_full_engine_makes_room_for_another_caller_at_once(priority: int) -> None:
    engine, _ = fake_engine(num_blocks=200, max_sequences=6)
    for i in range(40):
        engine.submit(ask(f"e{i}", EVIL, priority=priority))
    for _ in range(5):
        engine.step()
    assert engine.load().running == 6
    engine.submit(ask("g", GOOD))
    assert steps_to_first_token(engine, "g") <= 2
    assert engine.load().preemptions == 1, "one sequence gave way, no more"


def test_set_aside_by_another_caller_changes_no_answer() -> None:
    engine, _ = fake_engine(num_blocks=40, max_sequences=6)
    requests = [ask(f"e{i}", EVIL, prompt=3 + i % 9, new=20) for i in range(12)]
    requests += [ask(f"g{i}", GOOD, prompt=5, new=20) for i in range(4)]
    for request in requests[:12]:
        engine.submit(request)
    for _ in range(6):
        engine.step()
    for request in requests[12:]:
        engine.submit(request)
    events: dict[str, list[int]] = {}
    while not engine.idle:
        for event in engine.step():
            events.setdefault(event.request_id, []).extend(event.token_ids)
    assert engine.load().preemptions > 0
    for request in requests[12:]:
        assert events[request.request_id] == reference(request, 0)[0]


def test_a_long_queue_of_one_caller_does_not_stand_before_another() -> None:
    engine, _ = fake_engine(num_blocks=400, max_sequences=6, max_queue=2000)
    for i in range(1000):
        engine.submit(ask(f"e{i}", EVIL, prompt=16, new=8))
    engine.step()
    for i in range(20):
        engine.submit(ask(f"g{i}", GOOD, prompt=6, new=2))
        assert steps_to_first_token(engine, f"g{i}") <= 3


def test_the_cache_is_taken_back_from_whoever_holds_the_most() -> None:
    engine, _ = fake_engine(num_blocks=30, max_sequences=6, prefix_caching=False)  # evil's five fill it
    for i in range(5):
        engine.submit(ask(f"e{i}", EVIL, prompt=20 + i, new=30))
    for _ in range(12):
        engine.step()
    engine.submit(ask("g", GOOD, prompt=12, new=12))
    assert steps_to_first_token(engine, "g") <= 3
    engine.scheduler.residents.check()


def test_slots_are_shared_by_weight() -> None:
    engine, _ = fake_engine(num_blocks=400, max_sequences=6)
    double = Share("double", weight=2.0)
    for i in range(12):
        engine.submit(ask(f"e{i}", EVIL, new=50))
    for i in range(12):
        engine.submit(ask(f"d{i}", double, new=50))
    for _ in range(6):
        engine.step()
    running = [seq.flow.caller.name for seq in engine.scheduler.residents.running]
    assert (running.count("double"), running.count("evil")) == (4, 2)


def test_connections_of_one_address_share_what_the_address_gets() -> None:
    engine, _ = fake_engine(num_blocks=400, max_sequences=6)
    for i in range(12):
        engine.submit(ask(f"e{i}", Share("10.0.0.1", "5000"), new=50))
    engine.step()
    engine.submit(ask("same", Share("10.0.0.1", "5001"), new=4))
    assert steps_to_first_token(engine, "same") <= 2


def test_more_callers_than_slots_take_turns() -> None:
    engine, _ = fake_engine(num_blocks=400, max_sequences=2)
    requests = [ask(f"r{i}", Share(f"c{i}"), prompt=4, new=40) for i in range(6)]
    for request in requests:
        engine.submit(request)
    finish(engine, requests)


def test_one_sequence_that_fills_the_cache_is_let_finish() -> None:
    engine, _ = fake_engine(num_blocks=16, max_sequences=6)
    giant = ask("giant", EVIL, prompt=40, new=20)
    engine.submit(giant)
    engine.step()
    small = []
    tokens: list[int] = []
    for i in range(300):
        if engine.idle:
            break
        if i % 4 == 0:
            small.append(ask(f"s{i}", GOOD, prompt=10, new=6))
            engine.submit(small[-1])
        for event in engine.step():
            tokens += event.token_ids if event.request_id == "giant" else ()
            if event.request_id == "giant" and event.finish_reason is not None:
                assert tokens == reference(giant, 0)[0]
                return
    raise AssertionError("the giant never ended")


def test_a_head_that_does_not_fit_lets_others_by_but_not_for_ever() -> None:
    engine, _ = fake_engine(num_blocks=16, max_sequences=3, prefix_caching=False)
    for i in range(2):
        engine.submit(ask(f"s{i}", GOOD, prompt=12, new=20))
    engine.step()
    engine.submit(ask("large", EVIL, prompt=44, new=10))
    for i in range(2, 60):
        engine.submit(ask(f"s{i}", GOOD, prompt=12, new=20))
    started: list[str] = []
    while "large" not in started:
        started += [e.request_id for e in engine.step() if e.token_ids and e.request_id not in started]
    assert len(started) < 15


def test_within_a_caller_priority_still_counts() -> None:
    engine, _ = fake_engine(num_blocks=64, max_sequences=1)
    engine.submit(ask("busy", GOOD, new=4))
    engine.step()
    engine.submit(ask("later", GOOD, new=4))
    engine.submit(ask("sooner", GOOD, new=4, priority=-1))
    ended = []
    while not engine.idle:
        ended += [event.request_id for event in engine.step() if event.finish_reason]
    assert ended == ["busy", "sooner", "later"]


def test_decoding_rows_take_turns_where_all_would_make_the_step_long() -> None:
    engine, executor = fake_engine(num_blocks=400, max_sequences=40, max_step_tokens=64)
    pace = engine.scheduler.pace
    for size in (1, 2, 4, 8, 16, 32):
        for _ in range(5):
            pace.took(size, 0, 1.0 + size * 0.2)  # 1.5 times the shortest, 1.4 s for two rows, at 4 rows
    pace.took = lambda *given: None  # type: ignore[method-assign]
    requests = [ask(f"e{i}", EVIL, new=20) for i in range(30)] + [ask("g", GOOD, new=20)]
    for request in requests:
        engine.submit(request)
    for _ in range(40):
        if engine.load().running == 31:
            break
        engine.step()
    rows: list[int] = []
    tokens = 0
    for _ in range(10):
        executor.plans.clear()
        tokens += sum(len(e.token_ids) for e in engine.step() if e.request_id == "g")
        rows += [len(plan.tokens) for plan in executor.plans]
    assert max(rows) <= 4 and tokens >= 9, (rows, tokens)
    finish(engine, [])


def test_the_beams_of_one_search_are_computed_together_by_turns(tmp_path: Path) -> None:
    engine = engine_over(save_tiny("gpt2", tmp_path), share_stretch=1.01)
    alone = generate(engine, [SEARCHES[0]])[0]
    pace = engine.scheduler.pace
    for size in (1, 2, 4, 8):
        for _ in range(5):
            pace.took(size, 0, float(size))  # no two rows fit a step of one
    pace.took = lambda *given: None  # type: ignore[method-assign]
    search = replace(SEARCHES[0], request_id="shared", share=EVIL)
    stopping = StoppingCriteria(max_new_tokens=40, ignore_eos=True)
    others = [
        Request(
            request_id=f"g{i}", token_ids=(1, 2 + i), share=GOOD, sampling=SamplingParams(seed=i), stopping=stopping
        )
        for i in range(3)
    ]
    shared, *_ = generate(engine, [search, *others])
    assert [(r.token_ids, r.score) for r in shared] == [(r.token_ids, r.score) for r in alone]


def test_a_search_as_wide_as_the_engine_gives_way_after_a_few_tokens_and_finds_the_same(tmp_path: Path) -> None:
    engine = engine_over(save_tiny("gpt2", tmp_path), max_sequences=8)
    stopping = StoppingCriteria(max_new_tokens=40, ignore_eos=True)
    wide = Request(
        request_id="wide", token_ids=(3, 1, 4), share=EVIL, stopping=stopping,
        sampling=SamplingParams(temperature=0.0, beam=BeamParams(width=8)),
    )  # fmt: skip
    (alone,) = generate(engine, [replace(wide, request_id="alone")])[0]
    quantum = max(LEAST_QUANTUM, QUANTUM // 8)
    engine.submit(wide)
    for _ in range(3):
        engine.step()
    engine.submit(replace(wide, request_id="good", share=GOOD, sampling=SamplingParams(temperature=0.0)))
    tokens: dict[str, list[int]] = {}
    waited = 0
    while not engine.idle:
        waited += "good" not in tokens
        for event in engine.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
    assert waited <= quantum + 2, "it need not wait until the search has ended"
    assert tokens["wide"] == list(alone.token_ids)


def test_whoever_comes_while_one_request_has_every_slot_is_a_guest() -> None:
    engine, _ = fake_engine(num_blocks=400, max_sequences=16, max_step_tokens=64)
    engine.submit(ask("wide", EVIL, new=50, sampling=SamplingParams(n=16, temperature=0.0)))
    for _ in range(3):
        engine.step()
    assert engine.load().running == 16
    engine.submit(ask("first", GOOD, new=5))
    engine.submit(ask("more", EVIL, new=5))
    before = engine.load().generated_tokens
    assert steps_to_first_token(engine, "first") == 1 and engine.load().running == 17
    assert engine.load().generated_tokens - before < 4, "in a step that is not long"
    assert engine.load().preemptions == 0, "and nobody had to give way"
    while not engine.idle:
        engine.step()
        engine.scheduler.residents.check()
    assert engine.load().finished_requests == 3


def test_what_one_flow_does_not_want_goes_to_the_others() -> None:
    flows: list[Flow[Sequence]] = [
        Flow(Caller(str(i), live=1, weight=w), "", 0.0) for i, w in enumerate((1.0, 1.0, 2.0))
    ]
    parts = divided(40, dict(zip(flows, (2, 100, 100), strict=True)))
    assert [round(parts[flow], 2) for flow in flows] == [2.0, 12.67, 25.33]
    assert sum(divided(40, dict.fromkeys(flows, 100)).values()) == pytest.approx(40)


def test_nobody_saves_up_by_being_idle() -> None:
    queue, clock = FairQueue(16, Clock()), Clock()
    assert clock() == 0.0
    engine, _ = fake_engine(num_blocks=400, max_sequences=1)
    for i in range(6):
        engine.submit(ask(f"e{i}", EVIL, new=10))
    while engine.load().generated_tokens < 35:
        engine.step()
    engine.submit(ask("g", GOOD, new=2))
    good = engine.scheduler.answers["g"].flow.caller
    evil = next(flow.caller for flow in engine.scheduler.queue._flows.values() if flow.caller.name == "evil")
    assert 0 < good.served <= evil.served, "who comes late joins where the others are"
    assert len(queue) == 0


def test_callers_that_left_are_forgotten_by_number() -> None:
    queue = FairQueue(16, Clock())
    for i in range(3 * MAX_REMEMBERED):
        queue.leave(queue.join(Share("address", str(i))))
        queue.leave(queue.join(Share(f"name {i}")))
    assert len(queue._idle) == MAX_REMEMBERED and not queue._flows


def test_the_pace_is_that_of_the_shortest_step_and_learns_of_larger_ones() -> None:
    pace = StepTime(2.0, 1024, Clock())
    assert pace.rows(2) == 2, "as few as there are until it is known how long they take"
    for _ in range(5):
        pace.took(2, 0, 1.0)
    assert pace.rows(2) == 4, "the next size is worth a try"
    for size, seconds in ((4, 1.2), (8, 1.45), (16, 1.8)):
        for _ in range(5):
            pace.took(size, 0, seconds)
    assert pace.rows(2) == 8, "1.5 times the shortest is half of what may be added"
    for size, seconds in ((16, 0.1), (32, 0.3), (64, 0.9)):
        for _ in range(5):
            pace.took(2, size, 1.0 + seconds)
    assert pace.prompt_tokens(2) == 32
    assert pace.prompt_tokens(100) == 0, "a step without a prompt shows what so many rows take"


def test_deadlines_of_requests_that_have_ended_are_not_kept() -> None:
    engine, _ = fake_engine(num_blocks=64)
    for i in range(2000):
        engine.submit(ask(f"r{i}", GOOD, new=1, deadline=86400.0))
        engine.step()
    assert engine.idle and len(engine.scheduler._deadlines) < 200
