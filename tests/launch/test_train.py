"""The training command itself: killed, stopped by a signal, taken up again, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.training.checkpoint import latest_checkpoint
from cluster.training.metrics import read_records
from cluster.training.run_folder import METRICS, lock
from launch.main import main
from launch.progress import progress_line
from parallel.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tests" / "data" / "tokenizers" / "gpt2"
STEPS = 16


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    words = random.Random(0).choices(["the", "cat", "sat", "on", "a", "mat", "and", "sang"], k=3000)
    path.write_text(" ".join(words), encoding="utf-8")
    return path


def command(text: Path, out: Path, *more: str) -> list[str]:
    settings = [
        f"corpus.path={text}", f"out={out}", f"scratch.tokenizer={TOKENIZER}", f"steps={STEPS}", "save_every=4",
        f"schedule.total_steps={STEPS}", "schedule.warmup_steps=2", "corpus.tokens_per_sample=64",
    ]  # fmt: skip
    return ["train", "--config", "laptop", *settings, *more]


def begin(text: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch", *command(text, out)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def await_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 60
    while not any(line["step"] >= step for line in read_records(out / METRICS)):
        assert process.poll() is None and time.monotonic() < limit, f"step {step} was not reached"
        time.sleep(0.02)


def family_of(pid: int) -> set[int]:
    """A process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    family = {pid}
    while grown := {child for child, parent in parents.items() if parent in family} - family:
        family |= grown
    return family


def kill_all(process: subprocess.Popen[str]) -> None:
    for pid in family_of(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(10)


def checksums(out: Path) -> dict[str, str]:
    newest = latest_checkpoint(out)
    assert newest is not None and newest.name == f"step-{STEPS:08d}"
    sums: dict[str, str] = json.loads((newest / "training" / "state.json").read_text())["sha256"]
    return sums


@pytest.mark.ray
@pytest.mark.slow
def test_killed_then_stopped_by_a_signal_it_ends_with_the_undisturbed_bits(text: Path, tmp_path: Path) -> None:
    whole = begin(text, tmp_path / "whole")
    said, _ = whole.communicate(timeout=90)
    assert whole.returncode == 0 and "training gpt2 (float32)" in said and f"step {STEPS}/{STEPS}  loss" in said

    out = tmp_path / "disturbed"
    job = begin(text, out)
    await_step(out, 5, job)
    kill_all(job)
    assert (killed_at := latest_checkpoint(out)) is None or killed_at.name < f"step-{STEPS:08d}"

    job = begin(text, out)
    await_step(out, 7, job)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and "the same command goes on from there" in said
    assert (stopped_at := latest_checkpoint(out)) is not None and stopped_at.name < f"step-{STEPS:08d}"

    job = begin(text, out)
    assert job.wait(90) == 0
    assert checksums(out) == checksums(tmp_path / "whole")
    steps = [line["step"] for line in read_records(out / METRICS)]
    assert steps == list(range(1, STEPS + 1)), "a step is missing or there twice"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["corpus.batch_sise=2"], "unknown ['batch_sise']"),
        (["steps=0"], "steps is 0; give at least 1"),
        (["eval_every=5"], "nothing is held out and nothing is asked"),
        (["eval_every=5", "samples.prompts=[To be]", "samples.max_tokens=300"], "more than the model's context of 256"),
        (["samples.prompts=[To be]"], "no effect without eval_every"),
        (["recompute=some"], "choose one of ['none', 'selective', 'full']"),
        (["parallel.dp=9"], "every replica needs a sample"),
        (["parallel.dtype=float16"], "choose 'bfloat16' or 'float32'"),
        (["corpus.tokens_per_sample=300"], "more than the model's context of 256"),
        (["corpus.path=/nowhere.txt"], "corpus.path /nowhere.txt does not exist"),
        (["optimizer.learning_rate=0.5"], "set schedule.learning_rate"),
        (["scratch.tokenizer=null"], "nothing to train"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_and_leaves_no_folder(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(command(text, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_runs_folder_is_refused_before_anything_starts(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert main(command(text, tmp_path)) == 2
    assert "belongs to another run" in capsys.readouterr().err
    assert not (tmp_path / "start").exists()


def test_progress_says_loss_speed_and_time_left() -> None:
    lines = [{"step": n, "loss": 5.0 - n, "seconds": 0.5, "tokens": 100, "mfu": 0.25} for n in (1, 2)]
    assert progress_line(lines, 200) == "step 2/200  loss 3.0000  200 tokens/s  MFU 25.0 %  ETA 1:39"
    lines.append(lines[-1] | {"step": 100, "eval_loss": 2.5})
    assert "[##########..........]  loss 3.0000  eval 2.5000" in progress_line(lines, 200, bar=True)


def test_half_a_last_line_of_metrics_is_not_read(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step":')
    assert read_records(tmp_path / METRICS) == [{"step": 1}]


def test_a_folder_in_which_a_job_trains_is_free_again_when_that_job_is_gone(tmp_path: Path) -> None:
    held = lock(tmp_path / "lock", timeout_s=0.0)
    with pytest.raises(ConfigError, match="another job is training in"):
        lock(tmp_path / "lock", timeout_s=0.1)
    held.close()
    lock(tmp_path / "lock", timeout_s=0.0).close()
