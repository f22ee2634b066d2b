"""The engine over a fake executor whose tokens depend on every cached token: scheduling faults change answers."""

from __future__ import annotations

import pytest

from cluster.engine.engine import generate
from cluster.engine.request import (
    FinishReason,
    Request,
    ResponseOptions,
    SamplingParams,
    StoppingCriteria,
    TokenEvent,
)
from parallel.errors import CapacityError, QueueFull, RequestError
from tests.cluster.engine.fake_executor import EOS, VOCAB, Clock, fake_engine, logprob_of, reference

GREEDY = SamplingParams(temperature=0.0)


def ask(name: str, length: int, new: int | None = 8, **fields: object) -> Request:
    fields = {"sampling": GREEDY, "stopping": StoppingCriteria(max_new_tokens=new, ignore_eos=True), **fields}
    prompt = tuple((7 * i + length + sum(map(ord, name))) % VOCAB for i in range(length))
    return Request(request_id=name, token_ids=prompt, **fields)  # type: ignore[arg-type]


def drain(engine: object, limit: int = 1000) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    for _ in range(limit):
        if engine.idle:  # type: ignore[attr-defined]
            return events
        events += engine.step()  # type: ignore[attr-defined]
    raise AssertionError("the engine does not come to an end")


def test_a_batch_of_different_lengths_is_answered_as_one_by_one() -> None:
    engine, executor = fake_engine(num_blocks=64)
    requests = [ask(f"r{i}", 1 + 3 * i, new=1 + i) for i in range(10)]
    for request, (result,) in zip(requests, generate(engine, requests), strict=True):
        assert (result.token_ids, result.finish_reason) == reference(request, 0)
    assert max(len(plan.tokens) for plan in executor.plans) <= 16
    assert engine.load().kv_blocks_free == 64


def test_prompts_are_read_in_chunks_while_others_generate() -> None:
    engine, executor = fake_engine(num_blocks=64)
    generate(engine, [ask("short", 3, new=20), ask("long", 50, new=3)])
    mixed = [plan for plan in executor.plans if sorted(plan.query_lens)[0] == 1 and max(plan.query_lens) > 1]
    assert len(mixed) >= 3


def test_preemption_recomputes_and_changes_no_token() -> None:
    engine, _ = fake_engine(num_blocks=12)
    requests = [ask(f"r{i}", 8, new=24) for i in range(4)]
    results = generate(engine, requests)
    assert engine.load().preemptions > 0
    for request, (result,) in zip(requests, results, strict=True):
        assert (result.token_ids, result.finish_reason) == reference(request, 0)


def test_the_latest_arrival_is_preempted_and_the_first_never() -> None:
    engine, executor = fake_engine(num_blocks=12)
    order = []
    for request in [ask(f"r{i}", 8, new=24) for i in range(4)]:
        engine.submit(request)
    while not engine.idle:
        order += [event.request_id for event in engine.step() if event.finish_reason]
    assert order == ["r0", "r1", "r2", "r3"]
    slot = executor.plans[0].slots[0]
    lengths = [plan.context_lens[plan.slots.index(slot)] for plan in executor.plans[:24]]
    assert lengths == list(range(8, 32))


def test_samples_share_the_prompt_and_differ_after_it() -> None:
    engine, executor = fake_engine(num_blocks=64)
    request = ask("many", 10, new=8, sampling=SamplingParams(n=4, seed=11))
    (results,) = generate(engine, [request])
    for index, result in enumerate(results):
        assert (result.token_ids, result.finish_reason) == reference(request, index)
    assert len({tuple(result.token_ids) for result in results}) > 1
    assert sum(max(0, count - 1) for plan in executor.plans for count in plan.query_lens) == 9  # the prompt once
    assert sum(len(plan.copies) for plan in executor.plans) == 3  # its last, partly filled block three times
    assert engine.load().kv_blocks_free == 64


@pytest.mark.parametrize("length", [1, 4, 7, 8, 9])
@pytest.mark.parametrize("num_blocks", [5, 7, 9])
def test_samples_that_find_no_block_to_fork_into_come_later(length: int, num_blocks: int) -> None:
    engine, _ = fake_engine(num_blocks=num_blocks)
    request = ask("many", length, new=10, sampling=SamplingParams(n=5, seed=3))
    (results,) = generate(engine, [request])
    for index, result in enumerate(results):
        assert (result.token_ids, result.finish_reason) == reference(request, index)
    assert engine.load().kv_blocks_free == num_blocks


def test_a_stop_token_ends_the_sample_and_is_named_but_not_included() -> None:
    engine, _ = fake_engine(num_blocks=64)
    free = ask("free", 9, new=12)
    (first,) = generate(engine, [free])[0]
    stop = first.token_ids[5]
    place = first.token_ids.index(stop)
    stopping = StoppingCriteria(max_new_tokens=12, ignore_eos=True, stop_token_ids=(stop,))
    (result,) = generate(
        engine, [Request(request_id="s", token_ids=free.token_ids, sampling=GREEDY, stopping=stopping)]
    )[0]
    assert result.token_ids == first.token_ids[:place]
    assert (result.finish_reason, result.stop_token_id) == (FinishReason.STOP, stop)
    shown = StoppingCriteria(max_new_tokens=12, ignore_eos=True, stop_token_ids=(stop,), include_stop_sequence=True)
    (result,) = generate(engine, [Request(request_id="s", token_ids=free.token_ids, sampling=GREEDY, stopping=shown)])[
        0
    ]
    assert result.token_ids == first.token_ids[: place + 1]


def test_end_of_sequence_stops_unless_ignored() -> None:
    engine, _ = fake_engine(num_blocks=512)
    prompts = [ask(f"p{i}", 5 + i % 7, new=40, stopping=StoppingCriteria(max_new_tokens=40)) for i in range(30)]
    results = [samples[0] for samples in generate(engine, prompts)]
    stopped = [result for result in results if result.finish_reason is FinishReason.STOP]
    assert stopped
    assert all(result.stop_token_id == EOS and EOS not in result.token_ids for result in stopped)


def test_aborting_frees_the_blocks_before_the_next_step() -> None:
    engine, _ = fake_engine(num_blocks=64)
    for i in range(4):
        engine.submit(ask(f"r{i}", 20, new=20))
    for _ in range(5):
        engine.step()
    engine.abort([f"r{i}" for i in range(4)])
    assert engine.load().kv_blocks_free == 64
    events = engine.step()
    assert sorted(e.request_id for e in events) == ["r0", "r1", "r2", "r3"]
    assert all(e.finish_reason is FinishReason.ABORTED for e in events)
    assert engine.idle and engine.load().aborted_requests == 4


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_aborting_one_sample_leaves_the_others(steps: int, victim: int) -> None:
    engine, _ = fake_engine(num_blocks=64, max_step_tokens=6)
    request = ask("many", 10, new=6, sampling=SamplingParams(n=3, seed=5))
    engine.submit(request)
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    events = [event for _ in range(steps) for event in engine.step()]
    engine.abort_samples([("many", victim), ("unknown", 0)])
    for event in events + drain(engine):
        tokens[event.sample_index] += event.token_ids
    for index in {0, 1, 2} - {victim}:
        assert tokens[index] == reference(request, index)[0]
    assert engine.load().kv_blocks_free == 64


def test_a_deadline_ends_a_request_that_runs_and_one_that_waits() -> None:
    clock = Clock()
    engine, _ = fake_engine(num_blocks=8, clock=clock)
    engine.submit(ask("runs", 8, new=24, deadline=5.0))
    engine.submit(ask("waits", 20, new=8, deadline=7.0))
    engine.submit(ask("patient", 4, new=4))
    engine.step()
    clock.now = 5.5
    ended = {e.request_id: e.finish_reason for e in engine.step() if e.finish_reason}
    assert ended == {"runs": FinishReason.DEADLINE}
    clock.now = 8.0
    ended = {e.request_id: e.finish_reason for e in drain(engine) if e.finish_reason}
    assert ended == {"waits": FinishReason.DEADLINE, "patient": FinishReason.LENGTH}


def test_prompt_logprobs_arrive_once_and_in_order_whatever_the_chunks() -> None:
    for top in (0, 3):
        engine, _ = fake_engine(num_blocks=10)
        request = ask("scored", 23, new=6, response=ResponseOptions(prompt_logprobs=top))
        other = ask("other", 12, new=12)
        engine.submit(request)
        engine.submit(other)
        events = [event for event in drain(engine) if event.request_id == "scored"]
        carrying = [event for event in events if event.prompt_logprobs is not None]
        assert len(carrying) == 1 and carrying[0] is events[0]
        expected = [logprob_of(request.token_ids[:i], request.token_ids[i]) for i in range(1, 23)]
        assert [entry.logprob for entry in carrying[0].prompt_logprobs or ()] == expected
        assert tuple(t for event in events for t in event.token_ids) == tuple(reference(request, 0)[0])


@pytest.mark.parametrize("length", [1, 2, 13, 64])
def test_scoring_generates_nothing(length: int) -> None:
    engine, _ = fake_engine(num_blocks=20)
    request = ask("scored", length, new=None, score_only=True)
    (result,) = generate(engine, [request])[0]
    expected = [logprob_of(request.token_ids[:i], request.token_ids[i]) for i in range(1, length)]
    assert [entry.logprob for entry in result.prompt_logprobs or ()] == expected
    assert result.token_ids == [] and result.finish_reason is FinishReason.STOP
    assert engine.load().kv_blocks_free == 20


def test_a_resumed_request_goes_on_where_it_stopped() -> None:
    engine, _ = fake_engine(num_blocks=64)
    whole = ask("r", 10, new=12, sampling=SamplingParams(n=3, seed=9))
    full = [reference(whole, i)[0] for i in range(3)]
    resumed = ask(
        "r", 10, new=12, sampling=SamplingParams(n=3, seed=9),
        resumed_ids=(tuple(full[0][:4]), (), tuple(full[2])), finished_samples=(2,),
    )  # fmt: skip
    results = generate(engine, [resumed])[0]
    assert results[0].token_ids == full[0][4:]
    assert results[1].token_ids == full[1]
    assert results[2].finish_reason is None and results[2].token_ids == []


def test_priority_goes_first_but_nobody_waits_for_ever() -> None:
    clock = Clock()
    engine, _ = fake_engine(num_blocks=64, clock=clock, max_sequences=1, priority_patience=10.0)
    engine.submit(ask("busy", 4, new=4))
    engine.step()
    engine.submit(ask("low", 4, new=4, priority=1))
    engine.submit(ask("normal", 4, new=4))
    clock.now = 9.0
    engine.submit(ask("still ahead", 4, new=4))
    clock.now = 11.0
    engine.submit(ask("too late", 4, new=4))
    ended = [event.request_id for event in drain(engine) if event.finish_reason]
    assert ended == ["busy", "normal", "still ahead", "low", "too late"]


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    engine, _ = fake_engine(num_blocks=5)
    with pytest.raises(CapacityError, match=r"60 tokens and 8 new ones need 67 positions.*context holds 64"):
        engine.submit(ask("context", 60))
    with pytest.raises(CapacityError, match=r"18 tokens and 8 new ones need 25 places .* has 20"):
        engine.submit(ask("cache", 18))
    with pytest.raises(CapacityError, match=r"n is 7.*max_sequences = 6"):
        engine.submit(ask("samples", 4, sampling=SamplingParams(n=7)))
    assert engine.idle


def test_a_request_that_just_fits_is_served() -> None:
    engine, _ = fake_engine(num_blocks=5)
    request = ask("exact", 13)  # 13 + 8 - 1 = 20 places
    (result,) = generate(engine, [request])[0]
    assert result.token_ids == reference(request, 0)[0]
    open_ended = ask("open", 13, new=None)
    (result,) = generate(engine, [open_ended])[0]
    assert len(result.token_ids) == 8


def test_a_full_queue_and_a_used_id_are_refused() -> None:
    engine, _ = fake_engine(num_blocks=8, max_queue=2)
    engine.submit(ask("a", 4))
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.submit(ask("a", 4))
    engine.submit(ask("b", 4))
    with pytest.raises(QueueFull, match="2 sequences are waiting and engine.max_queue is 2"):
        engine.submit(ask("c", 4))
    drain(engine)
    engine.submit(ask("a", 4))


def test_timings_count_from_submission() -> None:
    clock = Clock()
    engine, _ = fake_engine(num_blocks=64, clock=clock)
    engine.submit(ask("r", 4, new=2))
    clock.now = 1.0
    engine.step()
    clock.now = 3.0
    (event,) = engine.step()
    assert event.timings is not None
    assert (event.timings.queued, event.timings.first_token, event.timings.total) == (1.0, 1.0, 3.0)


def test_an_idle_engine_keeps_its_group_alive() -> None:
    engine, executor = fake_engine()
    engine.keep_alive()
    assert engine.step() == [] and executor.keep_alives == 2
