"""Kills a training job again and again at random moments, and compares where it ends with the undisturbed run.

    python -m tests.launch.training.kill_training --kills 10 --seed 0

A kill is SIGKILL to all processes of the job at once, to the command alone (Ray and the ranks stay behind) or to one
rank. Then the same command is given again. Moments: while it starts, between steps, in steps, while it saves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.training.checkpoint.checkpointer import latest_checkpoint
from cluster.training.job.run_folder import METRICS, SAMPLES
from cluster.training.job.run_metrics import read_records

ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = ROOT / "tests" / "data" / "tokenizers" / "gpt2"
TEXT = ROOT / "tests" / "data" / "text" / "tinyshakespeare.txt"
SHAPE = "{model_type: gpt2, vocab_size: 50257, n_positions: 64, n_embd: 18, n_layer: 2, n_head: 3, eos_token_id: 50256}"
VICTIMS = ("everything", "the command", "one rank")
START_SHARE = 0.25
"""Of the kills, those that come at any moment of the start; the others come while steps are taken."""
PATIENCE_S = 300.0


@dataclass
class Kill:
    """One kill and what came of it."""

    victim: str
    after_s: float  # since the job was started
    step: int  # the last one in the metrics
    saved: int  # the newest complete checkpoint
    resume_s: float | None = None  # from the next start to the next new step


class Job:
    """The command, in a process of its own."""

    def __init__(self, arguments: Sequence[str], out: Path) -> None:
        self.out = out
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        self.started = time.monotonic()
        self.left: set[int] = set()  # after a kill: processes that may still have to notice it

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def step(self) -> int:
        """The last step in the metrics."""
        records = read_records(self.out / METRICS)
        return int(records[-1]["step"]) if records else 0

    def await_step(self, step: int, limit_s: float = PATIENCE_S) -> float:
        """Seconds since the start when the metrics have the step; an error where they do not get it."""
        while self.step() < step:
            if not self.running or self.seconds > limit_s:
                raise AssertionError(f"step {step} was not reached: {self.last_words()}")
            time.sleep(0.01)
        return self.seconds

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, limit_s: float = PATIENCE_S) -> tuple[int, str]:
        """Its exit status and what it said."""
        said, _ = self._process.communicate(timeout=limit_s)
        return self._process.returncode, said

    def kill(self, victim: str = VICTIMS[0]) -> None:
        """SIGKILL; returns when the command itself is gone."""
        family = family_of(self._process.pid)
        self.left = family - {self._process.pid}
        if victim == "everything":
            _kill(family)
        elif victim == "the command":
            _kill({self._process.pid})
        elif not self.kill_a_rank():
            _kill(family)
        self._process.wait(PATIENCE_S)  # not for its output's end: what is left behind may hold that open

    def kill_a_rank(self) -> bool:
        """SIGKILL to one, where there is one."""
        ranks = self.ranks()
        _kill({random.Random(len(ranks)).choice(ranks)} if ranks else set())
        return bool(ranks)

    def ranks(self) -> list[int]:
        """The processes of its ranks."""
        return sorted(pid for pid in family_of(self._process.pid) if _is_rank(pid))

    def await_line(self, words: str) -> str:
        """The next line it says that has these words, by which the test is timed: read as it comes."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if words in line:
                return line
        raise AssertionError(f"it ended and did not say {words!r}")

    def last_words(self) -> str:
        if self.running:
            self.kill()
            return "it was still running"
        return self.wait()[1][-2000:]


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


def _is_rank(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Worker")
    except (FileNotFoundError, ProcessLookupError):
        return False


def _kill(pids: set[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def await_gone(pids: set[int], limit_s: float = 240.0) -> None:
    """What killed jobs leave behind ends by itself; Ray's agents take a minute or two to notice."""
    limit = time.monotonic() + limit_s
    while left := {pid for pid in pids if _alive(pid)}:
        if time.monotonic() > limit:
            _kill(left)
            raise AssertionError(f"{len(left)} processes of killed jobs were still there after {limit_s:g} s")
        time.sleep(0.1)


def checksums(out: Path, steps: int) -> dict[str, str]:
    """Of every file of the last step's checkpoint: weights, moments, config."""
    newest = latest_checkpoint(out)
    assert newest is not None and newest.name == f"step-{steps:08d}", f"{newest} is not of step {steps}"
    sums: dict[str, str] = json.loads((newest / "training" / "state.json").read_text())["sha256"]
    return sums


def curve(out: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every step, as the metrics have them."""
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_records(out / METRICS)]


@dataclass(frozen=True)
class Settings:
    """One run's command."""

    folder: Path
    steps: int
    save_every: int

    def command(self, out: Path) -> list[str]:
        shape = self.folder / "shape.yaml"
        shape.write_text(SHAPE, encoding="utf-8")
        settings = [
            f"out={out}", f"scratch.preset={shape}", f"scratch.tokenizer={TOKENIZER}", f"corpus.path={TEXT}",
            f"steps={self.steps}", f"save_every={self.save_every}", f"schedule.total_steps={self.steps}",
            "corpus.tokens_per_sample=32", "corpus.batch_size=4", "eval_every=10", "eval_batches=1",
            "samples.prompts=[The king]", "samples.max_tokens=4", "peak_flops=1.0e+9", "plot=false",
            "placement.max_restarts=0",  # a killed rank ends the command, which is then given again
        ]  # fmt: skip
        return ["train", "--config", "laptop", *settings]


def disturbed(settings: Settings, out: Path, kills: int, rng: random.Random, start_s: float) -> list[Kill]:
    """A run killed so often, then left alone until its end."""
    done: list[Kill] = []
    left: set[int] = set()
    while len(done) < kills:
        victim = rng.choice(VICTIMS)
        before = done[-1] if done else Kill(VICTIMS[0], 0.0, 0, 0)
        file = _identity(out)
        job = Job(settings.command(out), out)
        if rng.random() < START_SHARE:
            time.sleep(rng.uniform(0.0, start_s))
        else:
            before.resume_s = _await_new_step(job, before.saved, file)
            share = (settings.steps - job.step()) // (kills - len(done) + 1)
            job.await_step(min(settings.steps - 1, job.step() + rng.randint(0, max(1, share))))
            time.sleep(rng.uniform(0.0, 0.3))
        after = job.seconds
        job.kill(victim)
        left |= job.left
        newest = latest_checkpoint(out)
        saved = int(newest.name.removeprefix("step-")) if newest else 0
        done.append(Kill(victim, after, job.step(), saved))
        print(f"kill {len(done)}: {victim} after {after:.1f} s, step {job.step()}, checkpoint {saved}", flush=True)
    file, job = _identity(out), Job(settings.command(out), out)
    done[-1].resume_s = _await_new_step(job, done[-1].saved, file)
    status, said = job.wait(600)
    assert status == 0, said
    await_gone(left)
    return done


def _identity(out: Path) -> int | None:
    """Of the metrics file: a resumed run writes a new one, cut back to its checkpoint."""
    path = out / METRICS
    return path.stat().st_ino if path.is_file() else None


def _await_new_step(job: Job, saved: int, before: int | None) -> float:
    """Seconds from the start to the first step that this job took itself."""
    while _identity(job.out) == before or job.step() <= saved:
        assert job.running and job.seconds < PATIENCE_S, f"no step after {saved}: {job.last_words()}"
        time.sleep(0.01)
    return job.seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims (default 0)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--save-every", type=int, default=5)
    args = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="kill-training-"))
    try:
        return compare(Settings(folder, args.steps, args.save_every), args.kills, random.Random(args.seed))
    finally:
        shutil.rmtree(folder)


def compare(settings: Settings, kills: int, rng: random.Random) -> int:
    """The undisturbed run, then the disturbed one, and whether they are the same."""
    whole, out = settings.folder / "whole", settings.folder / "killed"
    job = Job(settings.command(whole), whole)
    start_s = job.await_step(1)
    status, said = job.wait(600)
    assert status == 0, said
    print(f"undisturbed: {settings.steps} steps in {job.seconds:.1f} s, the first after {start_s:.1f} s", flush=True)
    done = disturbed(settings, out, kills, rng, start_s)
    resumed = [kill.resume_s for kill in done if kill.resume_s is not None]
    lost = [kill.step - kill.saved for kill in done]
    print(
        f"{len(done)} kills; from the next start to the next new step {min(resumed):.1f} to {max(resumed):.1f} s; "
        f"steps taken again: {min(lost)} to {max(lost)}"
    )
    same = {
        "weights, moments and config": checksums(whole, settings.steps) == checksums(out, settings.steps),
        "loss and gradient norm of every step": curve(whole) == curve(out),
        "samples": (whole / SAMPLES).read_bytes() == (out / SAMPLES).read_bytes(),
    }
    for what, equal in same.items():
        print(f"{what}: {'the same bits' if equal else 'DIFFERENT'}")
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
