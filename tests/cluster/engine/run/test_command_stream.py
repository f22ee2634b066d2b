"""The ordered stream of commands on real ranks, and faults: of the stream, of one request's numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engine.engine import generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig, num_kv_blocks
from cluster.engine.request import FinishReason, Request, ResponseOptions, SamplingParams, StoppingCriteria
from cluster.engine.run.command_stream import KEEP_ALIVE, STOP, Commands
from cluster.engine.run.executors import GroupExecutor, follow
from parallel.errors import CollectiveError, ConfigError
from parallel.ranks.flight_recorder import Flight
from parallel.ranks.group import Group
from tests.cluster.engine.fake_executor import Clock
from tests.cluster.engine.tiny_models import save_tiny
from tp_decoders import load


def stream(group: Group, commands_of_rank_0: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rank 0 issues; what the others heard."""
    commands = Commands(group.talk)
    if group.rank == 0:
        for command in commands_of_rank_0:
            commands.issue(*command)
        return []
    return [commands.receive() for _ in commands_of_rank_0]


def test_every_rank_hears_the_same_commands_in_the_same_order(ranks: Callable[..., list[Any]]) -> None:
    sent = [("step", [[1, 2], 3.5]), (KEEP_ALIVE,), ("save", "x" * 100_000), (STOP,)]
    assert ranks(3, stream, sent)[1:] == [sent, sent]


def silent(group: Group) -> str:
    """Rank 0 says nothing."""
    if group.rank == 0:
        time.sleep(1.2)
        return ""
    try:
        Commands(group.talk, silence_s=0.3).receive()
    except CollectiveError as error:
        return str(error)
    return "heard something"


def test_a_silent_rank_0_is_given_up_by_name(ranks: Callable[..., list[Any]]) -> None:
    message = ranks(2, silent)[1]
    assert "rank 1 waited for a command from rank 0" in message and "0.3 s" in message


def untaught(group: Group) -> str:
    commands = Commands(group.talk)
    if group.rank == 0:
        commands.issue("train", 3)
        commands.issue("dance")
        return ""
    heard: list[int] = []
    try:
        follow(None, commands, {"train": heard.append})  # type: ignore[arg-type]
    except CollectiveError as error:
        return f"{heard} {error}"
    return "followed"


def test_a_command_nobody_was_taught_is_an_error_and_others_are_obeyed(ranks: Callable[..., list[Any]]) -> None:
    message = ranks(2, untaught)[1]
    assert message.startswith("[3] rank 0 issued 'dance', which this rank was not taught")


class Recorder:
    """A comm that only remembers."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.sent = 0
        self.flight = Flight()

    def broadcast_bytes(self, payload: bytes | None, timeout: float | None = None) -> bytes:
        self.sent += 1
        return payload or b""


def test_keep_alives_are_sent_once_a_second_and_only_when_nothing_else_was() -> None:
    clock, comm = Clock(), Recorder()
    commands = Commands(comm, clock=clock)  # type: ignore[arg-type]
    for now in (0.2, 0.9, 1.0, 1.5, 1.9, 2.1):
        clock.now = now
        commands.keep_alive()
    assert comm.sent == 2
    clock.now = 3.0
    commands.issue("step")
    clock.now = 3.9
    commands.keep_alive()
    assert comm.sent == 3


def test_closing_twice_stops_once_and_a_group_of_one_sends_nothing() -> None:
    comm = Recorder()
    executor = GroupExecutor(None, Commands(comm))  # type: ignore[arg-type]
    executor.close()
    executor.close()
    assert comm.sent == 1
    alone = Commands(None)
    alone.issue("step")
    with pytest.raises(CollectiveError, match="group of one"):
        alone.receive()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_whose_logits_are_not_finite_ends_alone_with_an_error(checkpoint: Path, temperature: float) -> None:
    model = load(str(checkpoint))
    poison = 50
    with torch.no_grad():
        model.get_parameter("embed.weight")[poison] = math.nan
    config = EngineConfig(kv_blocks=32, max_sequences=4, max_step_tokens=64)
    engine = build_engine(build_runner(model, config, 0), config)

    def ask(name: str, ids: tuple[int, ...], **fields: Any) -> Request:
        sampling = SamplingParams(temperature=temperature, seed=1, bad_words=((poison,),))
        stopping = StoppingCriteria(max_new_tokens=5, ignore_eos=True)
        return Request(request_id=name, token_ids=ids, sampling=sampling, stopping=stopping, **fields)

    good, bad, scored, listed = generate(
        engine,
        [
            ask("good", (1, 2, 3)),
            ask("bad", (1, poison, 3)),
            ask("scored", (1, poison, 3), score_only=True),
            ask("listed", (1, 2, poison, 3), response=ResponseOptions(prompt_logprobs=2)),
        ],
    )
    assert good[0].finish_reason is FinishReason.LENGTH and len(good[0].token_ids) == 5
    for result in (bad[0], scored[0], listed[0]):
        assert result.finish_reason is FinishReason.ERROR and result.error is not None and "logits" in result.error
    assert engine.load().kv_blocks_free == 32


def test_a_failed_prompt_ends_all_of_its_samples(checkpoint: Path) -> None:
    model = load(str(checkpoint))
    with torch.no_grad():
        model.get_parameter("embed.weight")[50] = math.nan
    config = EngineConfig(kv_blocks=32, max_sequences=4, max_step_tokens=64)
    engine = build_engine(build_runner(model, config, 0), config)
    for response in (ResponseOptions(), ResponseOptions(prompt_logprobs=0)):
        request = Request(request_id="n", token_ids=(1, 50, 3), sampling=SamplingParams(n=3), response=response)
        (results,) = generate(engine, [request])
        assert [result.finish_reason for result in results] == [FinishReason.ERROR] * 3
        assert engine.load().kv_blocks_free == 32


def agreed(group: Group, folder: str, blocks: int) -> int:
    config = EngineConfig(kv_blocks=blocks + 5 * group.rank, max_sequences=2, max_step_tokens=16)
    return build_runner(load(folder, group=group), config, 0).cache.num_blocks


def test_ranks_agree_on_the_fewest_blocks_any_can_hold(checkpoint: Path, ranks: Callable[..., list[Any]]) -> None:
    assert ranks(3, agreed, str(checkpoint), 11) == [11, 11, 11]


def test_the_cache_is_sized_from_free_memory_but_not_beyond_use() -> None:
    config = EngineConfig(kv_memory_fraction=0.5, max_sequences=4, max_step_tokens=16)
    assert num_kv_blocks(config, 1000, 100_000, 4096) == 50
    assert num_kv_blocks(config, 1000, 10**9, 100) == 4 * 7
    with pytest.raises(ConfigError, match=r"one block needs 1000 bytes.*0\.5 of 1500 free bytes is 750"):
        num_kv_blocks(config, 1000, 1500, 4096)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_sequences", 0, "at least 1"),
        ("kv_memory_fraction", 1.5, "above 0 and at most 1"),
        ("kv_blocks", 0, "at least 1"),
        ("max_step_tokens", 8, "less than engine.max_sequences 64"),
        ("priority_patience", 0.0, "seconds above 0"),
    ],
)
def test_sizes_that_cannot_work_are_named(field: str, value: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig(**{field: value})  # type: ignore[arg-type]
