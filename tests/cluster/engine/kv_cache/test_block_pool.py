"""The block pool by itself, and prefixes shared between requests."""

from __future__ import annotations

import pytest

from cluster.engine.engine import generate
from cluster.engine.kv_cache.block_pool import ROOT, BlockPool
from cluster.engine.request import Request, ResponseOptions, SamplingParams, StoppingCriteria
from parallel.errors import ConfigError
from tests.cluster.engine.fake_executor import FakeExecutor, fake_engine, logprob_of, reference


def test_blocks_are_counted_by_reference() -> None:
    pool = BlockPool(6, 4)
    table = pool.allocate(3)
    twin, copy = pool.fork(table, 10)
    assert twin[:2] == table[:2] and copy == (table[2], twin[2]) and pool.num_free == 2
    assert pool.free(table) == [table[2]] and pool.num_free == 3
    assert sorted(pool.free(twin)) == sorted(twin) and pool.num_free == 6
    pool.check()


def test_a_fork_at_a_block_s_end_copies_nothing() -> None:
    pool = BlockPool(2, 4)
    table = pool.allocate(2)
    twin, copy = pool.fork(table, 8)
    assert twin == table and copy is None
    pool.free(table)
    assert pool.num_free == 0
    pool.free(twin)
    pool.check()
    assert pool.num_free == 2


def test_freeing_twice_and_a_pool_of_nothing_are_refused() -> None:
    pool = BlockPool(2, 4)
    table = pool.allocate(1)
    pool.free(table)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(table)
    with pytest.raises(ConfigError, match="at least one block"):
        BlockPool(0, 4)


def filled(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Blocks that hold these tokens, remembered."""
    blocks = pool.allocate(len(tokens) // pool.block_size)
    chain = ROOT
    for i, block in enumerate(blocks):
        chain = pool.remember(block, chain, tokens[i * pool.block_size : (i + 1) * pool.block_size])
    return blocks


def test_what_full_blocks_hold_is_found_by_everything_before_them() -> None:
    pool = BlockPool(8, 2)
    blocks = filled(pool, [1, 2, 3, 4, 5, 6])
    assert pool.find([1, 2, 3, 4, 9, 9], 3)[0] == blocks[:2]
    assert pool.find([1, 2, 3, 4, 5, 6], 2)[0] == blocks[:2]
    assert pool.find([9, 2, 3, 4, 5, 6], 3)[0] == []  # the same tokens after others are something else


def test_remembered_blocks_are_free_and_go_longest_unused_first() -> None:
    pool = BlockPool(4, 2)
    first, second = filled(pool, [1, 2, 3, 4]), filled(pool, [7, 8, 9, 9])
    pool.free(first)
    pool.free(second)
    assert pool.num_free == 4
    pool.share(first)
    pool.free(first)  # now used after `second`
    pool.allocate(1)
    assert pool.find([7, 8, 9, 9], 2)[0] == second[:1]  # its end went, its start is still there
    pool.allocate(1)
    assert pool.find([7, 8, 9, 9], 2)[0] == [] and pool.find([1, 2, 3, 4], 2)[0] == first
    pool.check()
    pool.forget()
    assert pool.find([1, 2, 3, 4], 2)[0] == [] and pool.num_free == 2
    pool.check()


GREEDY = SamplingParams(temperature=0.0)
STOP = StoppingCriteria(max_new_tokens=6, ignore_eos=True)


def computed(executor: FakeExecutor) -> int:
    total = sum(len(plan.tokens) for plan in executor.plans)
    executor.plans.clear()
    return total


@pytest.mark.parametrize("caching", [True, False])
def test_a_shared_prefix_is_computed_once(caching: bool) -> None:
    engine, executor = fake_engine(num_blocks=32, prefix_caching=caching)
    prefix = tuple(range(20))
    requests = [
        Request(request_id=str(i), token_ids=(*prefix, 40 + i), sampling=GREEDY, stopping=STOP) for i in range(3)
    ]
    for i, request in enumerate(requests):
        (result,) = generate(engine, [request])[0]
        assert result.token_ids == reference(request, 0)[0]
        assert computed(executor) == (6 if caching and i else 26)
        assert engine.load().kv_blocks_free == 32


def test_an_answer_s_tokens_serve_the_next_turn() -> None:
    engine, executor = fake_engine(num_blocks=32)
    first = Request(request_id="a", token_ids=tuple(range(10)), sampling=GREEDY, stopping=STOP)
    (result,) = generate(engine, [first])[0]
    computed(executor)
    second = Request(
        request_id="b", token_ids=(*first.token_ids, *result.token_ids, 3, 3), sampling=GREEDY, stopping=STOP
    )
    (answer,) = generate(engine, [second])[0]
    assert answer.token_ids == reference(second, 0)[0]
    assert computed(executor) == 18 + 5 - 12  # three full blocks of 10 + 5 cached tokens


def test_a_wholly_cached_prompt_still_computes_its_last_token() -> None:
    engine, executor = fake_engine(num_blocks=32)
    request = Request(request_id="a", token_ids=tuple(range(16)), sampling=GREEDY, stopping=STOP)
    expected = reference(request, 0)[0]
    for _ in range(2):
        assert generate(engine, [request])[0][0].token_ids == expected
    assert min(plan.query_lens[0] for plan in executor.plans) == 1


def test_scored_prompts_are_computed_whole() -> None:
    engine, _ = fake_engine(num_blocks=32)
    plain = Request(request_id="a", token_ids=tuple(range(20)), sampling=GREEDY, stopping=STOP)
    scored = Request(
        request_id="b",
        token_ids=plain.token_ids,
        sampling=GREEDY,
        stopping=STOP,
        response=ResponseOptions(prompt_logprobs=0),
    )
    generate(engine, [plain])
    (result,) = generate(engine, [scored])[0]
    ids = plain.token_ids
    assert [entry.logprob for entry in result.prompt_logprobs or ()] == [
        logprob_of(ids[:i], ids[i]) for i in range(1, 20)
    ]


def test_new_weights_recompute_what_runs_and_forget_what_was() -> None:
    engine, executor = fake_engine(num_blocks=32)
    request = Request(request_id="a", token_ids=tuple(range(20)), sampling=GREEDY, stopping=STOP)
    engine.submit(request)
    events = [event for _ in range(4) for event in engine.step()]
    assert events
    computed(executor)
    executor.cache.clear()  # whatever is read again must be written again
    engine.weights_changed()
    while not engine.idle:
        events += engine.step()
    assert [token for event in events for token in event.token_ids] == reference(request, 0)[0]
    assert computed(executor) == 20 + 5
