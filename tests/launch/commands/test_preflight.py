"""A preflight tells which node or link is unlike the others, and only then; and it measures real ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.actors.group.placement import assign
from cluster.actors.programs.preflight_rank import Link, checkpoint_digest, driver, pairs, tree_digest
from launch.commands.preflight import Report, oddities
from launch.main import main
from parallel.errors import CheckpointError

ROOT = Path(__file__).parents[3]
NANO = ROOT / "tests/data/gpt-nano-sort"
GIB = 1 << 30


def cluster(nodes: Sequence[str], links: Sequence[Link] = ()) -> list[Report]:
    """Ranks on nodes that are all alike."""
    same = {"torch": "2.13.0", "driver": "570.1"}
    reports = [
        Report(place=place, software=dict(same), clock_offset_s=0.001 * place.rank, free_bytes=80 * GIB)
        for place in assign(nodes, None)
    ]
    return [replace(reports[0], links=tuple(links)), *reports[1:]]


def link(a: int, b: int, nodes: str, latency_us: float = 30.0, gigabytes_s: float = 10.0) -> Link:
    return Link(ranks=(a, b), nodes=tuple(nodes), latency_us=latency_us, gigabytes_s=gigabytes_s)


def test_nodes_that_are_alike_are_not_complained_of() -> None:
    assert oddities(cluster("aabb", [link(0, 1, "a"), link(2, 3, "b", 36.0, 8.0), link(0, 2, "ab", 90.0, 1.0)])) == []


def test_the_node_with_another_version_is_named() -> None:
    reports = cluster("abc")
    reports[2].software["driver"] = "560.2"
    assert oddities(reports) == ["c: driver is 560.2, elsewhere 570.1"]


def test_of_two_nodes_that_differ_neither_is_the_odd_one() -> None:
    reports = cluster("ab")
    reports[1].software["torch"] = "2.12.0"
    assert oddities(reports) == ["torch differs: 2.13.0 on a, 2.12.0 on b"]


def test_another_checkpoint_on_one_node_is_found_though_only_its_first_rank_looked() -> None:
    reports = cluster("aabbcc")
    for rank, digest in ((0, "1"), (2, "2"), (4, "1")):
        reports[rank].software["checkpoint"] = digest
    assert oddities(reports) == ["b: checkpoint is 2, elsewhere 1"]


def test_a_clock_that_is_off_is_named() -> None:
    reports = cluster("abc")
    reports[0] = replace(reports[0], clock_offset_s=-90.0)
    assert oddities(reports) == ["a: its clock is -90.0 s off; is NTP running?"]


def test_a_rank_with_little_memory_is_named_with_its_node() -> None:
    reports = cluster("aabb")
    reports[3] = replace(reports[3], free_bytes=20 * GIB)
    assert oddities(reports) == ["rank 3 on b: 20.0 GiB free, elsewhere 80.0; does something else run there?"]


def test_a_node_whose_links_are_all_slow_is_named_not_its_neighbours() -> None:
    links = [link(0, 1, "ab"), link(0, 2, "ac", gigabytes_s=1.0), link(1, 2, "bc", gigabytes_s=1.2)]
    assert oddities(cluster("abc", links)) == ["c: all its links to other nodes are slow (30 us, 1.10 GB/s)"]


@pytest.mark.parametrize("slow", [link(2, 3, "b", gigabytes_s=2.0), link(2, 3, "b", latency_us=500.0)])
def test_a_slow_link_inside_a_node_is_measured_against_its_like(slow: Link) -> None:
    links = [link(0, 1, "a"), slow, link(0, 2, "ab", 900.0, 0.5)]
    (found,) = oddities(cluster("aabb", links))
    assert found.startswith("ranks 2 - 3 (b): ") and found.endswith("others of its kind 30 us, 10.00 GB/s")


def test_of_two_measurements_the_best_counts() -> None:
    assert link(0, 1, "ab", 900.0, 9.0).better(link(0, 1, "ab", 30.0, 0.1)) == link(0, 1, "ab", 30.0, 9.0)


def test_every_node_is_linked_to_every_other_and_each_rank_to_its_neighbour() -> None:
    assert pairs(list("aaabbc")) == [(0, 1), (1, 2), (3, 4), (0, 3), (0, 5), (3, 5)]


def test_a_checkpoint_is_told_from_one_with_a_changed_end_and_the_middle_needs_whole_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    data = bytearray(4 << 20)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(data)
    before = checkpoint_digest(str(tmp_path), False), checkpoint_digest(str(tmp_path), True)
    data[2 << 20] = 1
    weights.write_bytes(data)
    assert checkpoint_digest(str(tmp_path), False) == before[0] and checkpoint_digest(str(tmp_path), True) != before[1]
    data[-1] = 1
    weights.write_bytes(data)
    assert checkpoint_digest(str(tmp_path), False) != before[0]


def test_a_folder_without_a_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no config.json on .*; is it mounted there"):
        checkpoint_digest(str(tmp_path), False)


def test_the_project_s_own_sources_count_as_a_version(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/x.py").write_text("1")
    before = tree_digest(tmp_path)
    (tmp_path / "cluster/x.py").write_text("2")
    assert tree_digest(tmp_path) != before


def test_the_driver_s_version_is_read_from_the_kernel(tmp_path: Path) -> None:
    said = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (dvs-builder)\n"
    (tmp_path / "version").write_text(said)
    assert driver(tmp_path / "version") == "570.124.06"


@pytest.mark.ray
def test_two_ranks_of_this_machine_are_looked_at() -> None:
    words = ["preflight", "--ranks", "2", "--ray-address", "local", "--model", str(NANO)]
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s)" in done.stdout and "ranks 0 - 1 (" in done.stdout and "us for 16 KB" in done.stdout
    assert "checkpoint " in done.stdout and done.stdout.endswith("nothing odd\n")


def test_no_ranks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "--ranks", "0"]) == 2
    assert "give at least 1" in capsys.readouterr().err
