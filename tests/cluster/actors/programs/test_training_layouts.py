"""One run however it is spread: the same bits over tensor-parallel sizes, the same numbers over replicas and
micro-batches, and going on with another layout than the one it was stopped in. Dropout is on, as GPT-2's config says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.actors.programs.train_spec import TrainParallel
from cluster.training.job.run_folder import METRICS, claim_folder
from cluster.training.job.run_metrics import read_records
from tests.cluster.actors.programs.train_runs import STEPS, checksums, go, spec_of, weights, write_start
from tests.ranks import free_address

ALONE = TrainParallel()
ROUNDING = 2e-4  # six steps at a learning rate of 0.01


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def whole(start: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Any) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    go(ranks, spec_of(start, out, ALONE))
    return out


def losses(out: Path) -> torch.Tensor:
    records = read_records(out / METRICS)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return torch.tensor([[record["loss"], record["grad_norm"]] for record in records])


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        (TrainParallel(tp=2), {"recompute": "selective"}),
        (TrainParallel(tp=3, sequence_parallel=True), {"recompute": "full"}),
    ],
    ids=["tp2-selective", "tp3-sequence-parallel-full"],
)
def test_tensor_parallel_runs_have_the_bits_of_one_rank(
    start: Path, whole: Path, tmp_path: Path, ranks: Any, layout: TrainParallel, more: dict[str, Any]
) -> None:
    facts = go(ranks, spec_of(start, tmp_path / "run", layout, **more))
    assert {fact.step for fact in facts} == {0} and len({fact.parameters for fact in facts}) == 1
    assert checksums(tmp_path / "run") == checksums(whole)
    assert torch.equal(losses(tmp_path / "run"), losses(whole))


@pytest.mark.parametrize(
    ("layout", "more"),
    [(TrainParallel(tp=2, dp=2), {}), (ALONE, {"micro_batch_tokens": 40})],
    ids=["tp2xdp2", "micro-batches"],
)
def test_replicas_and_micro_batches_take_the_same_steps_within_rounding(
    start: Path, whole: Path, tmp_path: Path, ranks: Any, layout: TrainParallel, more: dict[str, Any]
) -> None:
    go(ranks, spec_of(start, tmp_path / "run", layout, **more))
    torch.testing.assert_close(losses(tmp_path / "run"), losses(whole), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights(tmp_path / "run"), weights(whole), rtol=0, atol=ROUNDING)


def test_dropout_is_as_the_config_says_unless_it_is_left_out(
    start: Path, whole: Path, tmp_path: Path, ranks: Any
) -> None:
    go(ranks, spec_of(start, tmp_path / "run", ALONE, dropout=False))
    assert (losses(tmp_path / "run")[:, 0] != losses(whole)[:, 0]).all()
    plain = write_start(tmp_path / "plain", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    go(ranks, spec_of(plain, tmp_path / "none", ALONE))
    assert torch.equal(losses(tmp_path / "run"), losses(tmp_path / "none"))


def test_a_run_goes_on_in_another_layout_and_back(start: Path, whole: Path, tmp_path: Path, ranks: Any) -> None:
    out = tmp_path / "run"
    for steps, layout in ((2, TrainParallel(tp=2)), (4, TrainParallel(dp=2)), (STEPS, TrainParallel(tp=3))):
        facts = go(ranks, spec_of(start, out, layout, steps=steps))
    assert facts[0].step == 4
    torch.testing.assert_close(losses(out), losses(whole), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights(out), weights(whole), rtol=0, atol=ROUNDING)


def test_stopped_and_resumed_in_its_own_layout_of_replicas_it_ends_with_the_same_bits(
    start: Path, tmp_path: Path, ranks: Any
) -> None:
    layout = TrainParallel(dp=2)
    go(ranks, spec_of(start, tmp_path / "whole", layout))
    go(ranks, spec_of(start, tmp_path / "run", layout, steps=2))
    go(ranks, spec_of(start, tmp_path / "run", layout))
    assert checksums(tmp_path / "run") == checksums(tmp_path / "whole")
    assert torch.equal(losses(tmp_path / "run"), losses(tmp_path / "whole"))


def _late_replica(group: Any, spec: Any, address: str) -> Any:
    """The run, with the writing threads of all replicas but the first a second late."""
    import time

    from cluster.training.checkpoint.checkpoint_writer import CheckpointWriter
    from tests.cluster.actors.programs.train_runs import run_rank

    run = CheckpointWriter.run

    def late(job: Any) -> Path:
        if job.dp.rank > 0:
            time.sleep(1.0)
        return run(job)

    CheckpointWriter.run = late  # type: ignore[assignment,method-assign]
    try:
        return run_rank(group, spec, address)
    finally:
        CheckpointWriter.run = run  # type: ignore[method-assign]


def test_a_replica_that_is_late_to_a_save_finds_it_done(start: Path, tmp_path: Path, ranks: Any) -> None:
    spec = spec_of(start, tmp_path / "run", TrainParallel(dp=2), start_timeout_s=100.0)
    claim_folder(Path(spec.out), spec.run())
    assert [facts.step for facts in ranks(2, _late_replica, spec, free_address())] == [0, 0]
