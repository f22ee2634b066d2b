"""Replayed steps of several ranks: the bits of one, whoever replays and whoever computes; and what ends such a step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from cluster.engine.engine import Engine
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, ResponseOptions, SamplingParams, StoppingCriteria
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from cluster.engine.run.model_runner import ModelRunner
from parallel.errors import CollectiveError
from parallel.ranks.group import Group
from parallel.ranks.shared_memory import ShmComm
from parallel.replay.program import Program
from tests.cluster.engine.tiny_models import CONFIGS, save_tiny
from tests.ranks import Ranks
from tp_decoders import load
from tp_decoders.adapters import lora
from tp_decoders.model.lora_config import LoraConfig

Run = Callable[..., list[Any]]
CONFIG = EngineConfig(kv_blocks=64, max_sequences=4, max_step_tokens=64)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: str(save_tiny(family, tmp_path_factory.mktemp(family))) for family in CONFIGS}


@dataclass(frozen=True)
class Setting:
    """What is served, and how."""

    folder: str
    dtype: torch.dtype = torch.bfloat16
    replays: tuple[bool, ...] = (True, True, True)  # which ranks do
    packed: bool = False
    adapted: bool = False
    fault: str = ""  # of the last rank's replays


@dataclass(frozen=True)
class Seen:
    """One rank's account: what was answered, how, and what its communicator says it did."""

    tokens: list[tuple[str, tuple[int, ...]]]
    logprobs: list[float]
    replayed: int
    refusals: dict[Any, str]
    counts: dict[str, int]
    byte_counts: dict[str, int]
    collectives: list[tuple[str, int, int]]


def serve(group: Group, setting: Setting) -> Seen:
    """Six sequences, greedy and drawn, that join and leave."""
    runner = runner_of(group, setting)
    tokens: list[tuple[str, tuple[int, ...]]] = []
    logprobs: list[float] = []
    before = dict(group.comm.counts) if group.comm else {}
    bytes_before = dict(group.comm.byte_counts) if group.comm else {}
    first = 0 if group.comm is None else group.comm.sequence  # type: ignore[attr-defined]
    with faulty_replays(setting.fault if group.rank == group.size - 1 else ""):
        commands = Commands(group.comm) if group.size > 1 else None
        if group.rank == 0:
            answer(build_engine(runner, CONFIG, (), commands), tokens, logprobs)
        else:
            assert commands is not None
            follow(runner, commands)
    programs, comm = runner.programs, group.comm
    done = [] if comm is None else [(name, n - first, size) for _, what, name, n, size in comm.flight.records() if
                                    what == "collective" and n > first]  # fmt: skip
    return Seen(
        tokens, logprobs, programs.replayed if programs else 0, dict(programs.refusals) if programs else {},
        {kind: count - before.get(kind, 0) for kind, count in comm.counts.items()} if comm else {},
        {kind: count - bytes_before.get(kind, 0) for kind, count in comm.byte_counts.items()} if comm else {}, done,
    )  # fmt: skip


def runner_of(group: Group, setting: Setting) -> ModelRunner:
    model = load(setting.folder, group=group, dtype=setting.dtype, packed=setting.packed)
    if setting.adapted:
        lora.attach(model, LoraConfig(rank=4, alpha=8.0))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".adapter." in name:
                    parameter.fill_(0.07)
    return build_runner(model, replace(CONFIG, replay=setting.replays[group.rank]), 0)


def answer(engine: Engine, tokens: list[tuple[str, tuple[int, ...]]], logprobs: list[float]) -> None:
    turn = 0
    while turn < 3 or not engine.idle:
        for i in range(2 if turn < 3 else 0):
            engine.submit(
                Request(
                    request_id=f"r{turn}-{i}", token_ids=(3 + turn, 1 + i, 4, 1),
                    sampling=SamplingParams(temperature=0.9 * i, seed=1, top_p=0.9, top_k=20),
                    stopping=StoppingCriteria(max_new_tokens=14 + 5 * i, ignore_eos=True),
                    response=ResponseOptions(logprobs=2),
                )
            )  # fmt: skip
        for _ in range(11):
            for event in engine.step():
                tokens.append((event.request_id, event.token_ids))
                logprobs += [each.logprob for each in event.logprobs or ()]
        turn += 1
    engine.close()


@contextmanager
def faulty_replays(fault: str) -> Iterator[None]:
    """fails: each third replay stops at some node that is no sum. killed, stopped: so is the process, halfway through
    the fifth one.
    """
    original, count = Program.replay, 0

    def replay(program: Program) -> int:
        nonlocal count
        count += 1
        if fault == "fails" and count % 3 == 0:
            places = [i for i, name in enumerate(program.names) if name != "comm_step"]
            return stopped(program, places[count * 7 % len(places)])
        if fault and fault != "fails" and count == 5:
            stopped(program, len(program) // 2)
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(program)

    def stopped(program: Program, place: int) -> int:
        kept, program._nodes[place].kind = program._nodes[place].kind, -1
        try:
            return original(program)
        finally:
            program._nodes[place].kind = kept

    if not fault:
        yield
        return
    with mock.patch.object(Program, "replay", replay):
        yield


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.bfloat16), (3, torch.float32)])
@pytest.mark.parametrize("family", CONFIGS)
def test_ranks_replay_with_the_bits_of_one_process(
    ranks: Run, family: str, size: int, dtype: torch.dtype, checkpoints: dict[str, str]
) -> None:
    """Three ranks share five or six heads unevenly."""
    setting = Setting(checkpoints[family], dtype)
    (alone,) = ranks(1, serve, replace(setting, replays=(False,)))
    for seen in ranks(size, serve, setting):
        assert seen.refusals == {} and seen.replayed > 15
        assert not seen.tokens or (seen.tokens, seen.logprobs) == (alone.tokens, alone.logprobs)


@pytest.mark.parametrize("change", [{"packed": True}, {"adapted": True}], ids=str)
def test_packed_weights_and_adapters_are_replayed_by_ranks(
    ranks: Run, change: dict[str, bool], checkpoints: dict[str, str]
) -> None:
    setting = Setting(checkpoints["gpt_neox"], **change)  # type: ignore[arg-type]
    (alone,) = ranks(1, serve, replace(setting, replays=(False,)))
    for seen in ranks(2, serve, setting):
        assert seen.refusals == {} and seen.replayed > 15
        assert not seen.tokens or (seen.tokens, seen.logprobs) == (alone.tokens, alone.logprobs)


def test_ranks_that_replay_and_ranks_that_compute_stay_in_step(ranks: Run, checkpoints: dict[str, str]) -> None:
    """The same collectives, in number, order, size and count, from whoever replays all, some or no steps."""
    setting = Setting(checkpoints["gpt2"])
    computed = ranks(3, serve, replace(setting, replays=(False, False, False)))
    for change in ({"replays": (True, False, True)}, {"replays": (False, True, True)}, {"fault": "fails"}):
        mixed = ranks(3, serve, replace(setting, **change))
        assert sum(seen.replayed > 10 for seen in mixed) >= 2
        for one, other in zip(mixed, computed, strict=True):
            assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)
            assert (one.counts, one.byte_counts) == (other.counts, other.byte_counts)
            assert one.collectives == other.collectives, "as the flight recorder has them"
            assert [n for _, n, _ in one.collectives] == [*range(1, len(one.collectives) + 1)]


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_rank_that_dies_or_hangs_within_a_replayed_step_is_named(
    rank_pool: Ranks, fault: str, checkpoints: dict[str, str]
) -> None:
    """At once where its process ends; within the limit of a collective where it does not."""
    rank_pool.run(2, shorter_limit, 60.0 if fault == "killed" else 1.0)
    outcome = rank_pool.outcomes(2, survivor, Setting(checkpoints["gpt2"], fault=fault))[0]
    assert outcome.error is None, outcome.error
    seconds, error, (name, number) = outcome.value
    assert seconds < 20.0
    assert ("the process of rank 1 died" if fault == "killed" else "rank 1 did not arrive within 1 s") in error
    assert f"{name} number {number} on rank 0" in error and name == "tree_sum", "the flight record ends with it"


def test_ranks_that_meet_anew_record_anew(ranks: Run, checkpoints: dict[str, str], tmp_path: Path) -> None:
    """A model that is kept, as over a peer's death: none of its programs sums over the ranks of before."""
    for (first, second), (after_first, after_second), old_sums in ranks(
        2, twice, Setting(checkpoints["gpt2"]), str(tmp_path / "store")
    ):
        assert first == second
        assert after_first > 15 and after_first + 15 < after_second
        assert old_sums == 0


def twice(group: Group, setting: Setting, path: str) -> tuple[list[Any], list[int], int]:
    """The answers before and after, how many steps were replayed by then, and the old group's sums afterwards."""
    old: Any = group.comm
    own = Group(group.rank, group.size, old)
    runner, answers, replayed, before = runner_of(own, setting), list[Any](), list[int](), 0
    for place in ("old", "new"):
        if place == "new":
            own.reconnect(ShmComm.meet(dist.FileStore(path, group.size), group.rank, group.size))
            before = old._ledger.begun
        tokens: list[tuple[str, tuple[int, ...]]] = []
        logprobs: list[float] = []
        if group.rank == 0:
            answer(build_engine(runner, CONFIG, (), Commands(old)), tokens, logprobs)
        else:
            follow(runner, Commands(old))
        assert runner.programs is not None
        answers.append((tokens, logprobs))
        replayed.append(runner.programs.replayed)
    assert own.comm is not None
    own.comm.close()
    return answers, replayed, old._ledger.begun - before


def shorter_limit(group: Group, limit_s: float) -> None:
    """The limit of a collective, shorter than the usual one."""
    comm: Any = group.comm
    comm.timeout_s = limit_s
    comm._lib.comm_limits(comm._handle, 0, 200_000, int(limit_s * 1e9))


def survivor(group: Group, setting: Setting) -> tuple[float, str, tuple[str, int]]:
    """When the other rank stopped: how long it took to learn of it, what was said, the last collective on record."""
    began, process = time.monotonic(), os.getpid()
    others = [n for n in group.talk.all_gather(torch.tensor([process]), [1] * group.size, 0).tolist() if n != process]
    try:
        serve(group, setting)
    except CollectiveError as error:
        assert group.comm is not None and group.comm.broken == str(error)
        with suppress(ProcessLookupError):  # so that the pool need not wait for it
            os.kill(others[0], signal.SIGKILL)
        _, _, name, number, _ = group.comm.flight.records()[-1]
        return time.monotonic() - began, str(error), (name, number)
    raise AssertionError("nobody failed")
