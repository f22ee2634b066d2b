"""The canary goes through every rank, disturbs no stream, and finds what a flag would not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import EngineLoad, Request, SamplingParams, StoppingCriteria
from cluster.engine.run.canary import Canary
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from parallel.ranks.group import Group
from tests.cluster.engine.tiny_models import save_tiny
from tp_decoders import load

CONFIG = EngineConfig(kv_blocks=32, max_sequences=4, max_step_tokens=64)
Answer = tuple[list[int], EngineLoad]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("gpt2", tmp_path_factory.mktemp("gpt2"))


def serve(group: Group, folder: str, every: int, spoil: int | None = None) -> Answer | None:
    """A seeded answer with a canary every so many steps; and the counters at the end."""
    runner = build_runner(load(folder, group=group), CONFIG, 0)
    if spoil == group.rank:
        with torch.no_grad():
            for weight in runner.model.parameters():
                weight.fill_(float("nan"))
    commands = Commands(group.comm) if group.size > 1 else None
    if group.rank != 0:
        assert commands is not None
        follow(runner, commands)
        return None
    engine = build_engine(runner, CONFIG, (), commands)
    stopping = StoppingCriteria(max_new_tokens=20, ignore_eos=True)
    sampling = SamplingParams(temperature=1.0, seed=3)
    engine.submit(Request(request_id="a", token_ids=(3, 1, 4), sampling=sampling, stopping=stopping))
    tokens: list[int] = []
    steps = 0
    while not engine.idle:
        tokens += [token for event in engine.step() for token in event.token_ids]
        steps += 1
        if every and steps % every == 0:
            engine.prove()
    answer = tokens, engine.prove()
    engine.close()
    return answer


def test_a_canary_proves_every_rank_and_changes_no_token(ranks: Callable[..., list[Any]], folder: Path) -> None:
    quiet, _ = ranks(2, serve, str(folder), 0)
    sung, _ = ranks(2, serve, str(folder), 1)
    assert sung[0] == quiet[0] and len(sung[0]) == 20
    found: EngineLoad = sung[1]
    assert found.canaries == 21 and found.canary_fault == ""
    assert [report.rank for report in found.ranks] == [0, 1]
    assert len({report.pid for report in found.ranks}) == 2, "each rank speaks for itself"
    assert all(report.memory_bytes > 10_000_000 and report.node for report in found.ranks)
    assert found.ranks[0].collectives == sum(count for count, _ in found.collectives.values()) - 1, "less its own"
    assert set(found.collective_seconds) >= set(found.collectives) and min(found.collective_seconds.values()) > 0
    assert 0 < found.ranks[0].collective_seconds <= sum(found.collective_seconds.values())
    assert found.ranks[1].collective_seconds > 0
    assert found.steps == quiet[1].steps and found.generated_tokens == 20, "a canary is no step of the engine"


def test_a_rank_whose_weights_are_spoilt_is_found_though_it_takes_part(
    ranks: Callable[..., list[Any]], folder: Path
) -> None:
    answer, _ = ranks(2, serve, str(folder), 0, 1)
    assert "not finite" in answer[1].canary_fault


def test_the_same_weights_must_give_the_same_token_and_new_weights_may_not(folder: Path) -> None:
    runner = build_runner(load(str(folder)), CONFIG, 0)
    canary = Canary(runner)
    canary.sing()
    canary.sing()
    assert canary.fault == "" and canary.count == 2 and canary.traffic() == {}
    with torch.no_grad():
        for weight in runner.model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    canary.sing()
    assert "gave token" in canary.fault
    runner.weight_version += 1
    canary.sing()
    assert canary.fault == ""
