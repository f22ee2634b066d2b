"""Where prompts go: to the longest known beginning, unless there is much more to do; what is remembered is bounded."""

from __future__ import annotations

import pytest

from cluster.frontend.fleet.routing import Router
from cluster.frontend.requests.call import RoutingConfig
from parallel.errors import ConfigError

SMALL = RoutingConfig(block_tokens=4, max_blocks=8, slack_tokens=100)


def prompt(first: int, length: int = 16) -> list[int]:
    return list(range(first, first + length))


def test_a_prompt_goes_where_the_longest_run_of_its_whole_blocks_was_sent() -> None:
    router = Router(2, SMALL)
    idle = {0: 0, 1: 0}
    system, other = prompt(0, 8), prompt(100, 8)
    assert router.choose([*system, 1, 2, 3, 4], idle) == 0
    assert router.choose(other, idle) == 1, "nothing of it is known: where the least was sent so far"
    assert router.choose([*system, 9, 9, 9, 9], idle) == 0
    assert router.choose(other + [9] * 20, {0: 0, 1: 90}) == 1
    assert router.choose(other[:3], {0: 0, 1: 5}) == 0, "less than a block says nothing"
    assert [(sent.by_prefix, sent.by_load) for sent in router.sent] == [(1, 2), (1, 1)]


def test_two_replicas_that_know_a_beginning_are_told_apart_by_how_much_of_it_then_by_load() -> None:
    router = Router(3, SMALL)
    router.choose(prompt(0, 8), {1: 0})
    router.choose(prompt(0, 16), {2: 0})
    assert router.choose(prompt(0, 16), {0: 0, 1: 0, 2: 50}) == 2
    assert router.choose(prompt(0, 8), {0: 0, 1: 40, 2: 50}) == 1


def test_a_known_beginning_does_not_count_where_there_is_much_more_to_do() -> None:
    router = Router(2, SMALL)
    router.choose(prompt(0), {0: 0})
    assert router.choose(prompt(0), {0: 100, 1: 0}) == 0, "just within the bound"
    assert router.choose(prompt(0), {0: 101, 1: 0}) == 1
    assert router.choose(prompt(0), {0: 101, 1: 0}) == 1, "which knows it now, too"


def test_a_replica_that_is_not_offered_is_not_chosen() -> None:
    router = Router(2, SMALL)
    router.choose(prompt(0), {0: 0})
    assert router.choose(prompt(0), {1: 10**6}) == 1


def test_equal_blocks_in_another_place_are_not_the_same_beginning() -> None:
    router = Router(2, SMALL)
    router.choose(prompt(0, 8), {1: 0})
    assert router.choose(prompt(4, 4), {0: 0, 1: 0}) == 0


def test_what_is_remembered_is_bounded_and_the_longest_unused_goes_first() -> None:
    router = Router(2, SMALL)
    kept, gone = prompt(0, 16), prompt(1000, 16)
    router.choose(gone, {0: 0})
    router.choose(kept, {0: 0})
    for first in range(5000, 5400, 100):
        router.choose(kept, {0: 0})
        router.choose(prompt(first, 12), {0: 0})
    assert len(router.sent[0].blocks) == 8
    assert router.choose(kept[:8], {0: 50, 1: 0}) == 0
    assert router.choose(gone, {0: 50, 1: 0}) == 1


def test_of_a_prompt_longer_than_what_is_remembered_the_beginning_is_kept() -> None:
    router = Router(2, SMALL)
    router.choose(prompt(0, 400), {0: 0})
    assert len(router.sent[0].blocks) == 8
    assert router.choose(prompt(0, 32), {0: 50, 1: 0}) == 0


def test_a_replica_whose_cache_is_gone_is_known_for_nothing() -> None:
    router = Router(2, SMALL)
    router.choose(prompt(0), {0: 0})
    router.forget(0)
    assert router.choose(prompt(0), {0: 50, 1: 0}) == 1


@pytest.mark.parametrize("wrong", [{"block_tokens": 0}, {"max_blocks": 0}, {"slack_tokens": -1}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"frontend.routing.{next(iter(wrong))} is"):
        RoutingConfig(**wrong)
