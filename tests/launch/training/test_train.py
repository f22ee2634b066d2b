"""The training command itself: killed, stopped by a signal, taken up again, and what it refuses."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

import pytest

from cluster.training.checkpoint.checkpointer import latest_checkpoint
from cluster.training.job.run_folder import METRICS, PLOT, SAMPLES, lock
from cluster.training.job.run_metrics import read_records
from launch.main import main
from launch.training.run_progress import Display, progress_line
from launch.training.run_training import draw
from parallel.errors import ConfigError
from tests.launch.training.kill_training import Job, checksums, curve

ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = ROOT / "tests" / "data" / "tokenizers" / "gpt2"
STEPS = 16
EVALUATION = ("eval_every=8", "samples.prompts=[the cat]", "samples.max_tokens=4")


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
        "corpus.batch_size=8", "corpus.split.eval_fraction=0.0", *EVALUATION,
    ]  # fmt: skip
    return ["train", "--config", "laptop", *settings, *more]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_robbed_of_a_rank_and_stopped_it_ends_with_the_undisturbed_bits(text: Path, tmp_path: Path) -> None:
    whole = Job(command(text, tmp_path / "whole"), tmp_path / "whole")
    status, said = whole.wait()
    assert status == 0 and "training gpt2 (float32)" in said and f"step {STEPS}/{STEPS}  loss" in said
    assert (tmp_path / "whole" / PLOT).read_bytes().startswith(b"\x89PNG") and "loss plot: " in said
    assert f"  sample, step {STEPS}: the cat|" in said

    out = tmp_path / "disturbed"
    job = Job(command(text, out), out)
    job.await_step(5)
    job.kill()
    assert (killed_at := latest_checkpoint(out)) is None or killed_at.name < f"step-{STEPS:08d}"

    job = Job(command(text, out, "save_every=2"), out)
    job.await_step(7)
    assert job.kill_a_rank()  # it goes on by itself
    saved = latest_checkpoint(out)
    job.await_step(9)
    job.signal(signal.SIGTERM)
    status, said = job.wait()
    assert status == 0 and "the same command goes on from there" in said
    assert "it does so by itself in 0 s (restart 1)" in said and saved is not None
    assert (stopped_at := latest_checkpoint(out)) is not None and stopped_at.name < f"step-{STEPS:08d}"

    job = Job(command(text, out), out)
    assert job.wait()[0] == 0
    assert checksums(out, STEPS) == checksums(tmp_path / "whole", STEPS)
    assert curve(out) == curve(tmp_path / "whole")
    assert [step for step, _, _ in curve(out)] == list(range(1, STEPS + 1)), "a step is missing or there twice"
    assert (out / SAMPLES).read_bytes() == (tmp_path / "whole" / SAMPLES).read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["corpus.batch_sise=2"], "unknown ['batch_sise']"),
        (["steps=0"], "steps is 0; give at least 1"),
        (["samples.prompts=[]"], "nothing is held out and nothing is asked"),
        (["samples.max_tokens=300"], "more than the model's context of 256"),
        (["eval_every=null"], "no effect without eval_every"),
        (["recompute=some"], "choose one of ['none', 'selective', 'full']"),
        (["parallel.dp=9", "ray.num_cpus=18"], "every replica needs a sample"),
        (["parallel.dtype=float16"], "choose 'bfloat16' or 'float32'"),
        (["corpus.tokens_per_sample=300"], "more than the model's context of 256"),
        (["corpus.path=/nowhere.txt"], "corpus.path /nowhere.txt does not exist"),
        (["optimizer.learning_rate=0.5"], "set schedule.learning_rate"),
        (["scratch.tokenizer=null"], "nothing to train"),
        (["corpus.encoding=rot13"], "corpus.encoding 'rot13' is"),
        (["corpus.kind=yaml"], "corpus.kind 'yaml' is unknown; choose one of ['csv', 'jsonl', 'table', 'text']"),
        (["corpus.field=content"], "corpus.field='content' means nothing for kind 'text'"),
        (["corpus.encoding=ascii", "corpus.path=tests/data/text/soseki-botchan.txt"], "is not ascii"),
        (["corpus.path=/dev/null"], "say what they are (corpus.kind)"),
        (["model=/nowhere"], "/nowhere"),
        (["scratch.tokenizer=/nowhere"], "/nowhere has no tokenizer"),
        (["lora.rank=0"], "lora rank 0; give at least 1"),
        (["lora.targets=[q_proj]"], "name no linear layer; choose from attn.c_attn"),
        (["lora.targets=all-linear", "lora.rnk=8"], "lora: unknown ['rnk']"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_and_leaves_no_folder(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(command(text, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["/proc/no/such", "/dev/null", "/dev/null/below"])
def test_a_folder_that_cannot_be_written_is_one_line(text: Path, capsys: pytest.CaptureFixture[str], out: str) -> None:
    assert main(command(text, Path(out))) == 2
    error = capsys.readouterr().err
    assert f"out {out} cannot be written" in error and error.count("\n") == 1


def test_tensorboard_that_is_not_there_is_an_error_at_once_and_a_plot_that_cannot_be_drawn_is_none(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(command(text, tmp_path / "out", "tensorboard=true")) == 2
    assert "pip install 'tp-decoders[train]', or set tensorboard=false" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert "matplotlib is not installed; pip install" in draw(tmp_path)


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
    lines.append(lines[-1] | {"step": 100})
    assert "[##########..........]  loss 3.0000  eval 2.5000" in progress_line(lines, 200, 2.5, bar=True)


def test_on_a_terminal_one_line_is_rewritten_and_samples_stand_on_lines_of_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = Display(40, terminal=True)
    record = {"step": 1, "loss": 5.0, "seconds": 0.5, "tokens": 100, "mfu": 0.25}
    shown.progress([record], last=False)
    shown.progress([record | {"step": 2, "eval_loss": 4.5}, record | {"step": 3}], last=False)
    shown.samples([{"step": 3, "prompt": "A:\n", "text": " b\n\nc "}])
    shown.progress([record | {"step": 40}], last=True)
    lines = capsys.readouterr().out.replace("\r\x1b[K", "\r").split("\n")
    assert [part.split("  ")[0] for part in lines[0].split("\r")] == ["", "step 1/40", "step 3/40"]
    assert "eval 4.5000" in lines[0] and lines[1] == "  sample, step 3: A: / | b / c"
    assert lines[2].startswith("\rstep 40/40  [####################]") and lines[3:] == [""]


def test_elsewhere_a_line_comes_now_and_then_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Display(40, terminal=False)
    record = {"step": 1, "loss": 5.0, "seconds": 0.5, "tokens": 100, "mfu": 0.25}
    for step in range(1, 41):
        shown.progress([record | {"step": step}], last=step == 40)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["step 1/40", "step 40/40"]


def test_half_a_last_line_of_metrics_is_not_read(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step":')
    assert read_records(tmp_path / METRICS) == [{"step": 1}]


def test_a_folder_in_which_a_job_trains_is_free_again_when_that_job_is_gone(tmp_path: Path) -> None:
    held = lock(tmp_path / "lock", timeout_s=0.0)
    with pytest.raises(ConfigError, match="another job is training in"):
        lock(tmp_path / "lock", timeout_s=0.1)
    held.close()
    lock(tmp_path / "lock", timeout_s=0.0).close()
