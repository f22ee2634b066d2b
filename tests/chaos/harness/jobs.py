"""The two commands that faults strike, kept up as a supervisor would: one that ends is given again.

`Served` is `tp-decoders serve`. `Training` is `tp-decoders train` on a small text, lap after lap: each lap is a whole
run in a folder of its own, and its last checkpoint must have the checksums of the undisturbed lap, which came first.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.training.job.run_folder import METRICS
from cluster.training.job.run_metrics import RecordReader
from launch.serving.serve_config import ServerConfig
from tests.chaos.harness.hosts import Hosts, command_process, end, python
from tests.launch.training.kill_training import checksums
from tests.multinode.commands import Command, Failed

POLL_S = 0.1
START_S = 240.0
DISK_BYTES = 96_000_000
KEEPS_STATE = "state_dir" in ServerConfig.__dataclass_fields__
"""Whether `serve` writes open requests down, so that its own process may be killed, too."""
SHAPE = (
    "{model_type: gpt_neox, vocab_size: 512, max_position_embeddings: 64, hidden_size: 24, num_hidden_layers: 2, "
    "num_attention_heads: 3, intermediate_size: 64, rotary_pct: 0.5, bos_token_id: 0, eos_token_id: 0}"
)
NO_LIMIT = ["placement.max_restarts=1000", "placement.restart_window_s=5"]
"""Faults come faster than a supervisor of a real cluster would accept."""


class Supervised:
    """A command that is started again whenever it ends; `lines` are those of all its lives."""

    def __init__(self, hosts: Hosts, words: Sequence[str], log: Path) -> None:
        self._hosts, self._words, self._log = hosts, list(words), log
        self._earlier: list[tuple[float, str]] = []
        self.command: Command | None = None
        self.starts = 0
        self.statuses: list[int | None] = []
        """How each life before the present one ended."""

    def start(self) -> None:
        if self.command is not None:
            self._earlier = self.lines
            self.statuses.append(self.command.status)
        words, env = self._hosts.command(["setsid", *python("-m", "launch", *self._words)])  # a group of its own
        self.command = Command(words, env=env, log=self._log)
        self.starts += 1

    @property
    def lines(self) -> list[tuple[float, str]]:
        return [*self._earlier, *(self.command.lines if self.command else [])]

    @property
    def status(self) -> int | None:
        return self.command.status if self.command else None

    @property
    def pid(self) -> int:
        assert self.command is not None, "started"
        return command_process(self.command.pid)

    def said(self, pattern: str, after: int) -> tuple[float, str] | None:
        """The first line with this in it, of those from number `after` on."""
        wanted = re.compile(pattern)
        return next(((when, line) for when, line in self.lines[after:] if wanted.search(line)), None)

    def kill(self) -> None:
        if self.status is None and self.command is not None:
            end(self.pid)

    def stop(self, limit: float = 60.0) -> int:
        """SIGTERM, and its exit status."""
        assert self.command is not None, "started"
        if self.command.status is None:
            os.kill(self.pid, 15)
        return self.command.wait(limit)


class Served(Supervised):
    """`tp-decoders serve` of a tiny model, its two ranks on different nodes."""

    def __init__(self, hosts: Hosts, model: Path, state: Path, log: Path, port: int, host: str) -> None:
        self.address = f"{host}:{port}"
        self.model = model
        anywhere = [] if host == "127.0.0.1" else ["--host", "0.0.0.0", "--insecure-listen-anywhere"]
        kept = [f"server.state_dir={state}"] if KEEPS_STATE else []
        words = [
            "serve", "--model", str(model), "--tp", "2", "--ray-address", hosts.address, "--port", str(port), "-v",
            "placement.strategy=STRICT_SPREAD", "placement.join_timeout_s=60", *NO_LIMIT, "engine.kv_blocks=1024",
            "engine.max_sequences=32", "server.drain_seconds=20", "observe.canary_every_s=1", *kept, *anywhere,
        ]  # fmt: skip
        super().__init__(hosts, words, log)

    def await_ready(self) -> None:
        assert self.command is not None, "started"
        self.command.says("ready: ", START_S)


@dataclass
class Lap:
    """A whole run, and whether it ended with the undisturbed bits."""

    number: int
    starts: int
    same: bool


class Training(Supervised):
    """`tp-decoders train`, lap after lap."""

    def __init__(self, hosts: Hosts, base: Path, runs: Path, text: Path, log: Path, steps: int) -> None:
        self.runs, self.steps = runs, steps
        self._base, self._text = base, text
        self.lap = 0
        self.laps: list[Lap] = []
        self.undisturbed: Mapping[str, str] = {}
        self._starts_before = 0
        write_inputs(base, text)
        super().__init__(hosts, [], log)

    @property
    def out(self) -> Path:
        return self.runs / f"lap-{self.lap}"

    def start(self) -> None:
        self._words = [
            "train", "--config", "laptop-gpt-neox", f"out={self.out}", f"scratch.preset={self._base / 'shape.yaml'}",
            f"scratch.tokenizer={self._base / 'tokenizer'}", f"corpus.path={self._base / 'text.txt'}",
            f"steps={self.steps}", f"schedule.total_steps={self.steps}", "save_every=10", "keep=3",
            "corpus.tokens_per_sample=32", "corpus.batch_size=4", "corpus.split.eval_fraction=0.0", "eval_every=null",
            "samples.prompts=[]", "peak_flops=1.0e+9", "plot=false", "parallel.tp=2", "ray.num_cpus=null",
            f"ray.address={self._hosts.address}", "placement.strategy=STRICT_SPREAD", "placement.join_timeout_s=60",
            *NO_LIMIT, "placement.stop_timeout_s=30",
        ]  # fmt: skip
        super().start()

    def step(self) -> int:
        """The last one in the present lap's metrics."""
        records = RecordReader(self.out / METRICS).fresh()
        return int(records[-1]["step"]) if records else 0

    def record_file(self) -> int | None:
        """A resumed run writes a new one, cut back to its checkpoint."""
        path = self.out / METRICS
        return path.stat().st_ino if path.is_file() else None

    def tend(self, again: bool) -> None:
        """After an end: that of a lap is compared, and the next one begins; any other is given again."""
        if self.status is None:
            return
        if self.status == 0:
            self._finish_lap()
            if not again:
                return
        self.start()

    def _finish_lap(self) -> None:
        sums = checksums(self.out, self.steps)
        self.undisturbed = self.undisturbed or sums
        self.laps.append(Lap(self.lap, self.starts - self._starts_before, sums == self.undisturbed))
        shutil.rmtree(self.out)
        self._starts_before = self.starts
        self.lap += 1


def write_inputs(base: Path, text: Path) -> None:
    """A tokenizer made from the text, the text's beginning, and the model's shape: a lap is a minute, not an hour."""
    part = text.read_text(encoding="utf-8")[:60_000]
    (base / "text.txt").write_text(part, encoding="utf-8")
    (base / "shape.yaml").write_text(SHAPE, encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([part], trainer)
    (base / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(base / "tokenizer" / "tokenizer.json"))


async def until(true: Callable[[], object], limit: float, what: str, tend: Callable[[], None] | None = None) -> None:
    """Waits for it, looking after what must be kept up meanwhile."""
    deadline = time.monotonic() + limit
    while not true():
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {limit:g} s")
        if tend is not None:
            tend()
        await asyncio.sleep(POLL_S)
