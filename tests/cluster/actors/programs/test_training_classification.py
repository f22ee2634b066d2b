"""A job that classifies texts: what it learns and leaves, that it goes on exactly, on one or two replicas alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.actors.programs.train_spec import CorpusConfig, TrainParallel, TrainSpec
from cluster.training.checkpoint.checkpointer import latest_checkpoint
from cluster.training.data.batches.eval_split import SplitRule
from cluster.training.data.batches.labelled_texts import LabelConfig
from cluster.training.job.run_folder import METRICS
from cluster.training.job.run_metrics import read_records
from cluster.training.step.lr_schedule import Schedule
from parallel.errors import ConfigError
from tests.cluster.actors.programs.train_runs import go, spec_of, write_start
from tp_decoders import load
from tp_decoders.model.task_config import SEQUENCES
from tp_decoders.tasks.task_outputs import task_config

STEPS = 24


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_start(tmp_path_factory.mktemp("start"), n_embd=24)
    moods = {"glad": "the sea sang all night", "sad": "the cat sat on a mat"}
    lines = [{"says": f"{text} {'and ' * (i % 5)}{i}", "mood": mood} for i in range(60) for mood, text in moods.items()]
    (folder / "moods.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


def spec(start: Path, out: Path, layout: TrainParallel, **more: Any) -> TrainSpec:
    corpus = CorpusConfig(
        path=str(start / "moods.jsonl"), tokens_per_sample=16, batch_size=8, split=SplitRule(eval_fraction=0.2)
    )
    labels = LabelConfig(text_field="says", label_field="mood")
    schedule = Schedule(learning_rate=1e-2, warmup_steps=1, total_steps=STEPS)
    given = {"corpus": corpus, "task": SEQUENCES, "labels": labels, "steps": STEPS, "save_every": 12, "eval_every": 12}
    return spec_of(start, out, layout, schedule=schedule, dropout=True, micro_batch_tokens=40, **given | more)


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_records(out / METRICS)]


def test_a_job_learns_classes_and_leaves_what_transformers_opens(start: Path, tmp_path: Path, ranks: Any) -> None:
    out = tmp_path / "out"
    go(ranks, spec(start, out, TrainParallel(tp=2)))
    records = read_records(out / METRICS)
    assert [r["step"] for r in records if "eval_accuracy" in r] == [12, 24]
    assert records[-1]["eval_accuracy"] == 1.0 and records[-1]["accuracy"] > records[0]["accuracy"]
    assert records[-1]["loss"] < 0.3 * records[0]["loss"]
    newest = latest_checkpoint(out)
    assert newest is not None
    opened = transformers.GPT2ForSequenceClassification.from_pretrained(newest)
    assert opened.config.id2label == {0: "glad", 1: "sad"}
    assert opened.config.problem_type == "single_label_classification"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(newest / "tokenizer.json"))
    for said, mood in (("the sea sang all night 3", 0), ("the cat sat on a mat 4", 1)):
        with torch.no_grad():
            assert int(opened(torch.tensor([tokenizer.encode(said)])).logits.argmax()) == mood
    assert task_config(load(newest, task=SEQUENCES)).labels == ("glad", "sad")


def test_it_goes_on_to_the_bit_and_two_replicas_learn_the_same(start: Path, tmp_path: Path, ranks: Any) -> None:
    whole, halves, replicas = (tmp_path / name for name in ("whole", "halves", "replicas"))
    go(ranks, spec(start, whole, TrainParallel(tp=1)))
    go(ranks, spec(start, halves, TrainParallel(tp=2), steps=12))
    go(ranks, spec(start, halves, TrainParallel(tp=2)))
    go(ranks, spec(start, replicas, TrainParallel(dp=2)))
    assert losses(halves) == losses(whole)
    assert losses(replicas) == pytest.approx(losses(whole), rel=1e-3)


def test_a_classifier_that_is_trained_further_keeps_its_labels(start: Path, tmp_path: Path, ranks: Any) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    names = LabelConfig(text_field="says", label_field="mood", names=("sad", "glad"))
    go(ranks, spec(start, first, TrainParallel(), labels=names, steps=12))
    trained = latest_checkpoint(first)
    assert trained is not None
    (trained / "moods.jsonl").write_bytes((start / "moods.jsonl").read_bytes())
    go(ranks, spec(trained, second, TrainParallel(), steps=12))
    newest = latest_checkpoint(second)
    assert newest is not None and task_config(load(newest, task=SEQUENCES)).labels == ("sad", "glad")
    assert losses(second)[0] < 0.5 * losses(first)[0], "its head was not made anew"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"says": "x"}, "a label is a name or its number"),
        ({"says": "x", "mood": "angry"}, "is none of"),
        ({"says": "", "mood": "sad"}, "has no text to classify"),
        ({"mood": "sad"}, "no field 'says'"),
    ],
)
def test_a_line_that_is_no_labelled_text_is_named(
    line: dict[str, str], words: str, start: Path, tmp_path: Path, ranks: Any
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text((start / "moods.jsonl").read_text() + "\n" + json.dumps(line), encoding="utf-8")
    given = spec(start, tmp_path / "out", TrainParallel())
    labels = replace(given.labels, names=("glad", "sad"))
    with pytest.raises(ConfigError, match=f"line 121.*{words}|line 121: {words}"):
        go(ranks, replace(given, corpus=replace(given.corpus, path=str(path)), labels=labels))


def test_what_does_not_go_with_classes_is_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a job's"):
        spec(start, tmp_path, TrainParallel(), task="question-answering")
    with pytest.raises(ConfigError, match="labels are set, but task is causal-lm"):
        spec(start, tmp_path, TrainParallel(), task="causal-lm")
    with pytest.raises(ConfigError, match="separator is not for task"):
        spec(start, tmp_path, TrainParallel(), corpus=CorpusConfig(path="x", separator="\n"), eval_every=None)
