"""The flight recorder: what ranks leave behind after a fault names the one that fell out of step, and where."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.actors.group.placement import Place
from cluster.actors.host.flight_dump import dump_of, write_dump
from cluster.engine.engine import generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, SamplingParams, StoppingCriteria
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from launch.main import main
from launch.observe.flight_analysis import judge, read_ranks
from parallel.errors import CollectiveError
from parallel.ranks.flight_recorder import COLLECTIVE, COMMAND, Flight
from parallel.ranks.group import Group
from tests.cluster.engine.tiny_models import save_tiny
from tests.ranks import Ranks
from tp_decoders import load

CONFIG = EngineConfig(kv_blocks=32, max_sequences=4, max_step_tokens=64)


def skip_one_sum(group: Group, after: int) -> None:
    """Takes no part in one of the sums to come, and goes on with what it has."""
    comm: Any = group.talk
    whole, in_place, done = comm.tree_sum, comm.tree_sum_in_place, 0

    def skips() -> bool:
        nonlocal done
        done += 1
        return done == after

    def tree_sum(nodes: torch.Tensor, tree: Any, bias: Any = None, dtype: Any = None) -> torch.Tensor:
        return nodes[0].to(dtype or torch.float32) if skips() else whole(nodes, tree, bias, dtype)

    def tree_sum_in_place(shape: Any, tree: Any, bias: Any = None, dtype: Any = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or torch.float32) if skips() else in_place(shape, tree, bias, dtype)

    comm.tree_sum, comm.tree_sum_in_place = tree_sum, tree_sum_in_place


def serve_with_a_slip(group: Group, folder: str, dumps: str, odd: int) -> None:
    """Generation over the group in which rank `odd` skips one sum of a decode step; every rank dumps as it fails.

    That rank computes every step, so that its sums are counted; the others replay theirs where they can.
    """
    config = replace(CONFIG, replay=group.rank != odd)
    runner, commands = build_runner(load(folder, group=group), config, 0), Commands(group.talk, 5.0)
    if group.rank == odd:
        skip_one_sum(group, 18)  # four of them a step: the second of the fifth
    place = Place(rank=group.rank, world=group.size, node=f"10.0.0.{group.rank}")
    try:
        if group.rank != 0:
            follow(runner, commands)
            return
        request = Request(
            request_id="a", token_ids=(3, 1, 4), sampling=SamplingParams(temperature=0.0),
            stopping=StoppingCriteria(max_new_tokens=20, ignore_eos=True),
        )  # fmt: skip
        generate(build_engine(runner, CONFIG, (), commands), [request])
    except CollectiveError as error:
        write_dump(Path(dumps), group.talk.flight, "g1", place, error, group.talk)
        raise


@pytest.mark.parametrize(("odd", "size", "comm"), [(1, 2, "shm"), (0, 2, "gloo"), (2, 3, "shm")])
def test_a_rank_that_skips_a_collective_is_named_with_the_command_it_was_in(
    rank_pool: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str], odd: int, size: int, comm: str
) -> None:
    folder = save_tiny("gpt2", tmp_path / "model")
    outcomes = rank_pool.outcomes(size, serve_with_a_slip, str(folder), str(tmp_path / "dumps"), odd, comm=comm)
    assert all(isinstance(outcome.error, CollectiveError) for outcome in outcomes), outcomes
    assert main(["flight", str(tmp_path / "dumps")]) == 0
    *_, verdict = capsys.readouterr().out.splitlines()
    assert f"rank {odd} on 10.0.0.{odd} fell out of step in command 5 (step)" in verdict
    assert "skipped" in verdict or re.search(r"where tree_sum( [0-9a-f]{8})? was due", verdict), verdict
    assert verdict.count("fell out of step") == 1, "nobody else is accused"


def rank_record(
    rank: int, world: int, events: list[tuple[str, str]], error: BaseException | None = None
) -> dict[str, Any]:
    """A dump of made-up events."""
    flight, commands, collectives = Flight(), 0, 0
    for what, name in events:
        commands += what == COMMAND
        collectives += what == COLLECTIVE
        flight.note(what, name, commands if what == COMMAND else collectives, 8)
    return json.loads(json.dumps(dump_of(flight, "g", Place(rank=rank, world=world, node=f"n{rank}"), error)))


CALL, SEND = (COMMAND, "step"), (COLLECTIVE, "broadcast_bytes")
SUM, MAXIMUM = (COLLECTIVE, "tree_sum"), (COLLECTIVE, "all_reduce_max")
LEAD, FOLLOW = [CALL, SEND, SUM, SUM, MAXIMUM], [SEND, CALL, SUM, SUM, MAXIMUM]


def test_a_rank_that_hangs_in_a_command_is_behind_the_others() -> None:
    late = CollectiveError("did not arrive")
    dumps = [
        rank_record(0, 3, LEAD * 2, late),
        rank_record(1, 3, FOLLOW + FOLLOW[:3], late),
        rank_record(2, 3, FOLLOW * 2, late),
    ]
    verdict = judge(read_ranks(dumps))
    assert verdict.ranks == (1,) and verdict.command == 2
    assert "rank 1 is behind" in verdict.text and "in command 2 (step), last began tree_sum" in verdict.text


def test_a_rank_without_a_dump_is_the_one_that_was_killed() -> None:
    verdict = judge(read_ranks([rank_record(0, 2, LEAD, CollectiveError("rank 1 died"))]))
    assert verdict.ranks == (1,) and "left no dump" in verdict.text and "command 1 (step)" in verdict.text


def test_a_rank_with_an_error_of_its_own_is_named_with_it() -> None:
    dumps = [
        rank_record(0, 2, LEAD, CollectiveError("rank 1 closed its end")),
        rank_record(1, 2, FOLLOW[:3], ZeroDivisionError("by zero")),
    ]
    verdict = judge(read_ranks(dumps))
    assert verdict.ranks == (1,) and "ZeroDivisionError: by zero" in verdict.text


def test_a_rank_0_that_was_silent_for_too_long_is_behind_though_it_went_on_later() -> None:
    """The follower gives up; rank 0 sends commands into the void until it learns of it."""
    start = [(COLLECTIVE, "barrier"), (COLLECTIVE, "all_gather")]
    late = CollectiveError("rank 0 did not arrive")
    lead, follower = rank_record(0, 2, [*start, *LEAD], late), rank_record(1, 2, [*start, SEND], late)
    lead["node"], follower["time"] = follower["node"], lead["time"] - 10.0
    for record in lead["records"][:2]:
        record[0] = 30.0
    verdict = judge(read_ranks([lead, follower]))
    assert verdict.ranks == (0,) and "last began all_gather number 2" in verdict.text
    assert "rank 1 was after no command, waiting for the next one" in verdict.text


def test_where_nothing_tells_which_of_two_ranks_is_odd_none_is_accused() -> None:
    dumps = [rank_record(0, 2, LEAD), rank_record(1, 2, [SEND, CALL, SUM, MAXIMUM, SEND])]
    verdict = judge(read_ranks(dumps))
    assert verdict.ranks == () and verdict.command == 1 and "nothing tells which" in verdict.text


def test_a_ring_that_went_round_keeps_the_last_records_in_order() -> None:
    flight = Flight(8)
    for number in range(20):
        flight.note(COLLECTIVE, "sum", number, 4)
    assert [number for _, _, _, number, _ in flight.records()] == list(range(12, 20))
    assert flight.forgotten == 12


def test_dumps_are_private_and_make_room_for_newer_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.actors.host.flight_dump.KEPT", 3)
    for life in range(5):
        place = Place(rank=0, world=1, node="n", life=life)
        path = write_dump(tmp_path / "dumps", Flight(), "g", place, CollectiveError("x"))
        assert path is not None and path.stat().st_mode & 0o777 == 0o600
        time.sleep(0.01)
    assert sorted(p.name for p in (tmp_path / "dumps").iterdir()) == [
        f"flight-g-life{life}-rank0.json" for life in (2, 3, 4)
    ]


def test_what_is_no_dump_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "flight-x.json"
    for text in ("{", "[]", '{"format": 1}'):
        wrong.write_text(text)
        assert main(["flight", str(wrong)]) == 2
        assert "dump" in capsys.readouterr().err
    assert main(["flight", str(tmp_path / "nowhere")]) == 2


def test_noting_costs_less_than_a_hundredth_of_the_shortest_decode_step() -> None:
    """A step of a two-layer model issues about ten collectives and takes more than 300 us on any machine."""
    flight, began, cpu = Flight(), time.thread_time(), 0.0
    for number in range(100_000):
        flight.note(COLLECTIVE, "tree_sum", number, 4096)
    cpu = time.thread_time() - began
    assert cpu / 100_000 * 10 < 300e-6 / 10, "ten times the bound on a quiet machine"
