"""The training program on two real ranks: what it leaves, that it goes on exactly, and whose folder it refuses."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from cluster.actors.group.worker_group import WorkerGroup
from cluster.actors.programs.train_program import TrainProgram
from cluster.actors.programs.train_spec import CorpusConfig, TrainParallel
from cluster.training.checkpoint.checkpointer import latest_checkpoint
from cluster.training.job.run_folder import METRICS, claim_folder, folder_origin
from cluster.training.job.run_metrics import read_records
from cluster.training.step.lr_schedule import Schedule
from launch.training.first_weights import copy_tokenizer, write_random
from parallel.errors import ConfigError, TpError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(600)]
TOKENIZER = Path(__file__).resolve().parents[3] / "data" / "tokenizers" / "gpt2"
SHAPE = {
    "model_type": "gpt2", "vocab_size": 50257, "n_positions": 64, "n_embd": 12, "n_layer": 1, "n_head": 3,
    "eos_token_id": 50256,
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    write_random(SHAPE, folder)
    copy_tokenizer(TOKENIZER, folder)
    words = random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat", "and", "sang"], k=600)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def spec(start: Path, out: Path, steps: int = 6) -> TrainProgram:
    return TrainProgram(
        model=str(start), origin=folder_origin(start), out=str(out), steps=steps, save_every=2,
        corpus=CorpusConfig(path=str(start / "text.txt"), tokens_per_sample=16, batch_size=4),
        schedule=Schedule(learning_rate=1e-2, warmup_steps=1, total_steps=6), parallel=TrainParallel(tp=2),
    )  # fmt: skip


def go(spec: TrainProgram) -> dict[str, str]:
    """Runs to the last step; the checksums of all files of its checkpoint."""
    claim_folder(Path(spec.out), spec.run())
    group = WorkerGroup(spec, size=2)
    limit = time.monotonic() + 200
    try:
        group.start()
        while (newest := latest_checkpoint(Path(spec.out))) is None or newest.name != f"step-{spec.steps:08d}":
            assert (fault := group.wait_fault(0.1)) is None, fault
            assert time.monotonic() < limit, f"no checkpoint of step {spec.steps}"
    finally:
        group.close()
    sums: dict[str, str] = json.loads((newest / "training" / "state.json").read_text())["sha256"]
    return sums


@pytest.fixture(scope="module")
def undisturbed(start: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, go(spec(start, out))


def test_a_run_leaves_metrics_and_a_checkpoint_that_transformers_opens(
    undisturbed: tuple[Path, dict[str, str]],
) -> None:
    out, _ = undisturbed
    lines = read_records(out / METRICS)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["learning_rate"] == 0.0 and lines[-1]["loss"] < lines[0]["loss"] - 0.4
    newest = latest_checkpoint(out)
    assert newest is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(newest)
    ids = transformers.AutoTokenizer.from_pretrained(newest)("the cat sat on a mat", return_tensors="pt").input_ids
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < lines[0]["loss"] - 0.5


def test_stopped_after_three_steps_it_goes_on_to_the_bits_and_metrics_of_the_undisturbed_run(
    start: Path, tmp_path: Path, undisturbed: tuple[Path, dict[str, str]]
) -> None:
    out, sums = undisturbed
    go(spec(start, tmp_path, steps=3))
    assert go(spec(start, tmp_path)) == sums
    timeless = [
        [(line["step"], line["loss"], line["grad_norm"], line["learning_rate"]) for line in read_records(f / METRICS)]
        for f in (out, tmp_path)
    ]
    assert timeless[0] == timeless[1]


def test_another_runs_folder_is_refused_by_what_differs(
    start: Path, tmp_path: Path, undisturbed: tuple[Path, dict[str, str]]
) -> None:
    mine = spec(start, undisturbed[0])
    claim_folder(Path(mine.out), mine.run())
    other = replace(mine, corpus=replace(mine.corpus, seed=1), origin="other weights")
    with pytest.raises(ConfigError, match=r"belongs to another run \(its corpus, origin differ\)"):
        claim_folder(Path(other.out), other.run())
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="it is not a run of this command"):
        claim_folder(tmp_path, spec(start, tmp_path).run())


def test_the_ranks_themselves_refuse_a_checkpoint_of_another_run(
    start: Path, tmp_path: Path, undisturbed: tuple[Path, dict[str, str]]
) -> None:
    newest = latest_checkpoint(undisturbed[0])
    assert newest is not None
    (tmp_path / newest.name).symlink_to(newest)
    other = replace(spec(start, tmp_path), schedule=Schedule(learning_rate=0.5, kind="constant"))
    group = WorkerGroup(other, size=2)
    with pytest.raises(TpError, match=r"belongs to another run \(its schedule differ"):
        group.start()
    group.close()
