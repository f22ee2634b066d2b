"""Batches whose loss or gradient is not finite: the run ends with an account of them, or goes on as if they were not
there, whatever the layout. The poison is real: documents with a word whose embedding holds no numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.actors.programs.train_rank import TrainRank
from cluster.actors.programs.train_spec import TrainParallel, TrainSpec
from cluster.training.data.batches.data_state import DataState
from cluster.training.job.run_folder import METRICS, SKIPPED, claim_folder
from cluster.training.job.run_metrics import read_records
from cluster.training.job.skipped_batches import BatchPlace, SkippedBatches, names_batch
from cluster.training.step.nonfinite_errors import PoisonBatch
from cluster.training.step.optimizer import OptimizerConfig
from launch.training.first_weights import write_random
from parallel.errors import ConfigError
from parallel.ranks.group import Group
from tests.cluster.actors.programs import train_runs
from tests.cluster.actors.programs.train_runs import STEPS, checksums, go, go_here, spec_of, weights, write_start
from tests.ranks import free_address
from tp_decoders.text.tokenizer import load_tokenizer

NEOX = {
    "model_type": "gpt_neox", "vocab_size": 50257, "eos_token_id": 50256, "hidden_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 3, "intermediate_size": 48, "max_position_embeddings": 64, "rotary_pct": 0.5,
    "tie_word_embeddings": False,
}  # fmt: skip
POISONED = (20, 47, 71, 100)
ROUNDING = 2e-4


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that cannot read one word, and a text of which a few documents have it."""
    folder = write_start(tmp_path_factory.mktemp("start"))
    write_random(NEOX, weights_of := tmp_path_factory.mktemp("neox") / "neox")
    for path in weights_of.iterdir():
        path.replace(folder / path.name)
    lines = (folder / "text.txt").read_text(encoding="utf-8").splitlines()
    for number in POISONED:
        lines[number] += " zebra"
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    tensors["gpt_neox.embed_in.weight"][tokenizer.encode(" zebra")[0]] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


class Lacking(TrainRank):
    """A run whose data lacks some batches."""

    lacks: Sequence[int] = ()

    def _step(self, records: Any) -> dict[str, float]:
        while self._loader.state.batches + 1 in self.lacks:
            self._loader.skip(1)
        return super()._step(records)


def run_lacking(group: Group, spec: TrainSpec, address: str, lacks: Sequence[int]) -> None:
    Lacking.lacks = lacks
    kept, train_runs.TrainRank = train_runs.TrainRank, Lacking  # type: ignore[misc]
    try:
        train_runs.run_rank(group, spec, address)
    finally:
        train_runs.TrainRank = kept  # type: ignore[misc]


@pytest.fixture(scope="module")
def skipping(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "skipping"
    go_here(spec_of(start, out, TrainParallel(), on_nonfinite="skip"))
    return out


def skipped(out: Path) -> list[int]:
    return [record["batch"] for record in read_records(out / SKIPPED)]


def test_a_run_that_skips_ends_with_the_bits_of_one_whose_data_lacks_those_batches(
    start: Path, skipping: Path, tmp_path: Path
) -> None:
    found = read_records(skipping / SKIPPED)
    assert found and {int(n) for r in found for n in _documents(r["what"])} <= set(POISONED)
    assert found[0]["what"].startswith("the loss is nan: the loss of document")
    assert found[-1]["total"] == len(found)
    spec = spec_of(start, tmp_path / "lacking", TrainParallel())
    claim_folder(tmp_path / "lacking", spec.run())
    run_lacking(Group.single(), spec, free_address(), skipped(skipping))
    assert checksums(skipping) == checksums(tmp_path / "lacking")
    records = read_records(skipping / METRICS)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[-1]["skipped"] == len(found) and all(record["loss"] < 100 for record in records)
    losses = [record["loss"] for record in read_records(tmp_path / "lacking" / METRICS)]
    assert losses == [record["loss"] for record in records]


def _documents(what: str) -> list[str]:
    return what.split("document")[1].lstrip("s ").split(" is")[0].split(", ")


def test_two_ranks_skip_the_same_batches_and_keep_the_same_bits(
    start: Path, skipping: Path, tmp_path: Path, ranks: Any
) -> None:
    go(ranks, spec_of(start, tmp_path / "tp2", TrainParallel(tp=2), on_nonfinite="skip"))
    assert checksums(tmp_path / "tp2") == checksums(skipping)
    assert read_records(tmp_path / "tp2" / SKIPPED) == read_records(skipping / SKIPPED)


def test_two_replicas_skip_what_only_one_of_them_saw(start: Path, skipping: Path, tmp_path: Path, ranks: Any) -> None:
    go(ranks, spec_of(start, tmp_path / "dp2", TrainParallel(dp=2), on_nonfinite="skip"))
    own, alone = (read_records(out / SKIPPED) for out in (tmp_path / "dp2", skipping))
    assert [record["batch"] for record in own] == [record["batch"] for record in alone]
    assert [_documents(record["what"]) for record in own] == [_documents(record["what"]) for record in alone]
    assert {record["what"].rsplit("first seen by ", 1)[1] for record in own} <= {"rank 0", "rank 1"}
    ours, theirs = (torch.nan_to_num(weights(out)) for out in (tmp_path / "dp2", skipping))
    assert (ours - theirs).abs().max() < ROUNDING


@pytest.mark.parametrize("layout", [TrainParallel(), TrainParallel(tp=2), TrainParallel(dp=2)], ids=str)
def test_a_run_that_stops_names_step_batch_document_and_rank_on_every_rank_alike(
    start: Path, skipping: Path, tmp_path: Path, rank_pool: Any, layout: TrainParallel
) -> None:
    spec = spec_of(start, tmp_path / "run", layout)
    claim_folder(tmp_path / "run", spec.run())
    first = read_records(skipping / SKIPPED)[0]
    outcomes = rank_pool.outcomes(layout.world, train_runs.run_rank, spec, free_address())
    assert {type(outcome.error).__name__ for outcome in outcomes} == {"PoisonBatch"}
    (message,) = {str(outcome.error).splitlines()[0] for outcome in outcomes}
    assert f"step {first['step']}, batch {first['batch']} of the data (epoch 0, position {first['position']}" in message
    assert first["what"].split("; first")[0] in message and "first seen by rank" in message
    assert "no weight was changed; mend the documents, or set on_nonfinite=skip" in message
    assert names_batch(f"rank 0 on 10.0.0.1: {message}") == f"step {first['step']}, batch {first['batch']} of the data"


def test_taken_up_again_a_run_counts_on_and_writes_no_batch_down_twice(
    start: Path, skipping: Path, tmp_path: Path
) -> None:
    first = read_records(skipping / SKIPPED)[0]["step"]
    half = spec_of(start, tmp_path / "run", TrainParallel(), on_nonfinite="skip", steps=max(first, STEPS - 1))
    go_here(half)
    go_here(spec_of(start, tmp_path / "run", TrainParallel(), on_nonfinite="skip"))
    assert read_records(tmp_path / "run" / SKIPPED) == read_records(skipping / SKIPPED)
    assert checksums(tmp_path / "run") == checksums(skipping)


def test_too_many_in_a_row_or_in_all_end_a_run() -> None:
    place = BatchPlace(before=DataState(identity={}, batches=6, sample=24), samples=4)
    in_a_row = SkippedBatches("skip", 2, 100)
    for expected in (1, 2):
        assert in_a_row.skip(5, place, PoisonBatch("the loss is nan"))["total"] == expected
    with pytest.raises(PoisonBatch, match=r"step 5, batch 7 of the data .*; 2 before it were left out in a row"):
        in_a_row.skip(5, place, PoisonBatch("the loss is nan"))
    in_all = SkippedBatches("skip", 2, 3, total=2)
    in_all.skip(5, place, PoisonBatch("the loss is nan"))
    assert in_all.taken() == {"skipped": 3}
    with pytest.raises(PoisonBatch, match=r"3 were left out before it \(max_skipped\)"):
        in_all.skip(6, place, PoisonBatch("the loss is nan"))


def test_settings_that_mean_nothing_are_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on_nonfinite is 'ignore'; choose one of"):
        spec_of(start, tmp_path, TrainParallel(), on_nonfinite="ignore")
    with pytest.raises(ConfigError, match="max_skipped is 0; give at least 1"):
        spec_of(start, tmp_path, TrainParallel(), max_skipped=0)
    spec = json.dumps(spec_of(start, tmp_path, TrainParallel(), on_nonfinite="skip").run())
    assert "nonfinite" not in spec, "a run that stopped may go on with another choice"


def test_an_update_that_would_not_be_finite_is_a_batch_that_gives_no_numbers(tmp_path: Path) -> None:
    folder = write_start(tmp_path / "fine")
    write_random(NEOX, tmp_path / "neox")
    for path in (tmp_path / "neox").iterdir():
        path.replace(folder / path.name)
    broken = OptimizerConfig(epsilon=0.0)  # rows of words that do not occur: 0 / 0
    words = (
        r"step 1, batch 1 of the data .*the update would leave the weight of .* not finite \(.*epsilon 0.*change the"
    )
    with pytest.raises(PoisonBatch, match=words):
        go_here(spec_of(folder, tmp_path / "stops", TrainParallel(), optimizer=broken))
    with pytest.raises(PoisonBatch, match="3 before it were left out in a row"):
        go_here(spec_of(folder, tmp_path / "skips", TrainParallel(), optimizer=broken, on_nonfinite="skip"))
    assert [line["step"] for line in read_records(tmp_path / "skips" / SKIPPED)] == [1, 1, 1]
