"""Five faults under load on three raylets of this machine (a hundred on three hosts: `make chaos`), and its judges:
what counts as a lost, doubled or changed token, and which faults are drawn."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from parallel.native.compiled import library
from tests.chaos.faults.kinds import KINDS, drawn, flip, tensor_byte
from tests.chaos.harness.hosts import Raylets, free_port
from tests.chaos.harness.jobs import KEEPS_STATE
from tests.chaos.harness.load import compare
from tests.chaos.run import Plan, Run

TEXT = Path(__file__).resolve().parents[1] / "data" / "text" / "tinyshakespeare.txt"
FIVE = (
    "refused connects", "SIGSTOP of a training rank", "kill -9 of a raylet", "corrupt checkpoint",
    "kill -9 of the front-end" if KEEPS_STATE else "kill -9 of the training command",
)  # fmt: skip


@pytest.mark.parametrize(
    ("got", "verdict"),
    [
        ([1, 2, 3, 4], ""), ([1, 2, 3], "lost: 3 tokens of 4"), ([1, 2, 2, 3, 4], "doubled: 5 tokens instead of 4"),
        ([1, 2, 9, 4], "changed: token 2 is 9, not 3"), ([1, 3, 4], "changed"), ([], "lost"),
    ],
)  # fmt: skip
def test_a_token_that_is_lost_doubled_or_changed_is_told_by_that_name(got: list[int], verdict: str) -> None:
    problem = compare(got, [1, 2, 3, 4])
    assert problem.startswith(verdict) if verdict else not problem


@pytest.mark.parametrize("count", [18, 30, 100])
def test_the_same_seed_draws_the_same_faults_of_every_kind(count: int) -> None:
    first, again, other = (drawn(list(KINDS), count, random.Random(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == count and set(first) == set(KINDS)
    if count == 100:
        assert Counter(first) == {kind: share for kind, (share, _) in KINDS.items()}


def test_one_bit_of_a_tensor_flips_and_flips_back(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    path.write_bytes(whole := len(header).to_bytes(8, "little") + header + b"abcd")
    at = tensor_byte(path, random.Random(0))
    assert at >= 8 + len(header)
    flip(path, at)
    assert sum(a != b for a, b in zip(path.read_bytes(), whole, strict=True)) == 1
    flip(path, at)
    assert path.read_bytes() == whole


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_five_faults_cost_no_token_no_answer_and_no_bit_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    library.available()  # compiled here if need be
    with tempfile.TemporaryDirectory(prefix="tp-", ignore_cleanup_errors=True) as folder:  # short, for Ray's sockets
        base = Path(folder)
        (base / "logs").mkdir()
        hosts = Raylets(base)
        try:
            plan = Plan(faults=5, seed=0, minutes=12, tokens=100, steps=300, kinds=FIVE)
            status = Run(hosts, base, TEXT, "127.0.0.1", free_port()).go(plan)
        finally:
            hosts.close()
        assert status == 0, capsys.readouterr().out
        found = json.loads((base / "logs/chaos.json").read_text())
    assert [fault["kind"] for fault in found["faults"]] == list(FIVE)
    assert all(fault["named"] and fault["healed"] for fault in found["faults"])
    assert len(found["laps"]) >= 2 and all(lap["same"] for lap in found["laps"])
