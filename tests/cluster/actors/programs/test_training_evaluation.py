"""What a run shows of itself on the way: the held-out loss and samples are the live model's, and cost it no bit."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.actors.programs.train_spec import SampleConfig, TrainParallel
from cluster.training.checkpoint.checkpointer import latest_checkpoint
from cluster.training.job.run_folder import METRICS, SAMPLES, TENSORBOARD
from cluster.training.job.run_metrics import TensorBoard, read_records
from tests.cluster.actors.programs.train_runs import STEPS, checksums, go, spec_of, write_start

PROMPTS = ("the cat", "all night")
ASKED = SampleConfig(prompts=PROMPTS, max_tokens=5)
EVALUATED = {"eval_every": 2, "eval_batches": 100, "samples": ASKED, "tensorboard": True}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def shown(start: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Any) -> Path:
    out = tmp_path_factory.mktemp("runs") / "shown"
    go(ranks, spec_of(start, out, TrainParallel(tp=2), **EVALUATED))
    return out


def test_evaluation_and_samples_change_no_bit_of_the_run(start: Path, shown: Path, tmp_path: Path, ranks: Any) -> None:
    go(ranks, spec_of(start, tmp_path / "run", TrainParallel(tp=2)))
    assert checksums(tmp_path / "run") == checksums(shown)


def test_samples_come_at_the_asked_steps_and_are_the_continuations_of_the_weights_of_that_moment(shown: Path) -> None:
    records = read_records(shown / SAMPLES)
    assert [(r["step"], r["prompt"]) for r in records] == [(n, p) for n in (2, 4, STEPS) for p in PROMPTS]
    newest = latest_checkpoint(shown)
    assert newest is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(newest)
    tokenizer = transformers.AutoTokenizer.from_pretrained(newest)
    for record in records[-2:]:
        ids = tokenizer(record["prompt"], return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert record["text"] == tokenizer.decode(out[0, ids.shape[1] :])
        assert record["tokens"] == 5 and record["ended"] == "length"


def test_the_held_out_loss_is_that_of_the_saved_model_on_the_held_out_documents(shown: Path) -> None:
    from cluster.training.data.batches.eval_split import SplitRule
    from cluster.training.data.batches.packing import PackedDataset
    from cluster.training.data.store.token_store import TokenStore

    records = read_records(shown / METRICS)
    assert [r["step"] for r in records if "eval_loss" in r] == [2, 4, STEPS]
    newest = latest_checkpoint(shown)
    assert newest is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(newest)
    store = TokenStore.open(shown / "tokens")
    held_out = PackedDataset(
        store, tokens_per_sample=32, split=SplitRule(eval_fraction=0.2), part="eval", shuffle=False
    )
    rows = held_out.rows(0, 0, 1000)
    batch = held_out.read(rows, 0, rows)
    total, count = 0.0, 0
    for document in batch.token_ids.split(list(batch.lengths)):
        if len(document) > 1:
            with torch.no_grad():
                loss = model(document[None], labels=document[None]).loss
            total, count = total + float(loss) * (len(document) - 1), count + len(document) - 1
    assert 20 < count == batch.global_weight
    assert math.isclose(records[-1]["eval_loss"], total / count, rel_tol=1e-5)


def test_replicas_share_the_held_out_part_and_find_the_same_loss(
    start: Path, shown: Path, tmp_path: Path, ranks: Any
) -> None:
    go(ranks, spec_of(start, tmp_path / "run", TrainParallel(dp=3), **EVALUATED))
    mine, theirs = (read_records(out / METRICS)[-1]["eval_loss"] for out in (tmp_path / "run", shown))
    assert math.isclose(mine, theirs, rel_tol=1e-4)
    assert len(read_records(tmp_path / "run" / SAMPLES)) == 3 * len(PROMPTS)


def test_records_and_tensorboard_of_a_resumed_run_have_each_step_once(start: Path, tmp_path: Path, ranks: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    go(ranks, spec_of(start, out, TrainParallel(), **EVALUATED | {"steps": 4}))
    with (out / SAMPLES).open("a") as file:  # of steps after the checkpoint that is resumed from
        file.write('{"step": 5, "prompt": "lost"}\n')
    time.sleep(1.1)  # TensorBoard reads files in the order of the second in their names
    board = TensorBoard(out / TENSORBOARD, step=4)
    board.write({"step": 5, "loss": 99.0})
    board.close()
    time.sleep(1.1)
    go(ranks, spec_of(start, out, TrainParallel(), **EVALUATED))
    assert [r["step"] for r in read_records(out / SAMPLES)] == [2, 2, 4, 4, STEPS, STEPS]
    read = EventAccumulator(str(out / TENSORBOARD))
    read.Reload()
    assert [event.step for event in read.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert max(event.value for event in read.Scalars("train/loss")) < 99
    assert [event.step for event in read.Scalars("eval/loss")] == [2, 4, STEPS]
    assert "samples/1/text_summary" in read.Tags()["tensors"]


def test_utilisation_is_the_models_arithmetic_over_time_and_peak(shown: Path) -> None:
    for record in read_records(shown / METRICS):
        flops = record["mfu"] * record["seconds"] * 2 * 1e9  # two ranks of the given peak
        matrices = 50257 * 12 + 2 * 12 * 12 * 12
        assert 6 * matrices < flops / record["tokens"] < 6 * matrices * 1.01
