"""A rank that trains: meets the others, loads its shard, resumes where its folder's newest checkpoint stands, and
takes steps until the last one or until told to stop.

    OUT/run.json        what decides the run's numbers; a folder with another one is refused
    OUT/tokens/         the corpus, tokenized once by rank 0
    OUT/step-*/, latest checkpoints, each one a Hugging Face checkpoint
    OUT/metrics.jsonl   one line per step, by rank 0

A `Program` (see worker.py) without Ray. It does not draw, evaluate or sample, and knows one replica on CPUs only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from cluster.actors.cores import claim_cores
from cluster.actors.place import Place
from cluster.actors.spec import ParallelConfig
from cluster.actors.worker import Phases
from cluster.training.checkpoint import Checkpointer, latest_checkpoint, read_state, restore_optimizer
from cluster.training.data.loader import Loader
from cluster.training.data.packed import PackedDataset
from cluster.training.data.sources import SourceOptions, open_source
from cluster.training.data.state import DataState
from cluster.training.data.store import TokenStore
from cluster.training.data.tokenize import tokenize_corpus
from cluster.training.optimizer import OptimizerConfig
from cluster.training.schedule import Schedule
from cluster.training.trainer import TrainBatch, Trainer, TrainerConfig
from parallel.errors import ConfigError
from parallel.mesh import Groups, Wiring, init_groups
from parallel.native import library
from tp_decoders import load
from tp_decoders.tokenizer import load_tokenizer

log = logging.getLogger(__name__)
RUN, TOKENS, METRICS = "run.json", "tokens", "metrics.jsonl"
LOCK_S = 20.0
"""How long a rank waits for the rank of a job that was killed a moment ago to be gone."""
TAIL_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which text, and how it is cut into batches."""

    path: str
    separator: str | None = None  # between documents of a text file; None: a file is one document
    tokens_per_sample: int = 128
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens_per_sample", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"corpus.{name} is {getattr(self, name)}; give at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """One run. `origin` says which weights it starts from, wherever `model` lies."""

    model: str
    origin: str
    out: str
    corpus: CorpusConfig
    schedule: Schedule
    steps: int
    save_every: int = 100
    keep: int = 2
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    start_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.parallel.device != "cpu":
            raise ConfigError(f"parallel.device is {self.parallel.device!r}; this command trains on 'cpu' only so far")
        if self.optimizer.learning_rate != OptimizerConfig.learning_rate:
            raise ConfigError("optimizer.learning_rate has no effect beside a schedule; set schedule.learning_rate")

    def __call__(self, place: Place, phases: Phases) -> TrainRank:
        return TrainRank(self, place, phases)

    def run(self) -> dict[str, Any]:
        """Everything that decides the run's numbers but how long it goes on and, on CPUs, how many ranks share it."""
        corpus = {name: value for name, value in asdict(self.corpus).items() if name != "path"}
        decided = {
            "origin": self.origin,
            "corpus": corpus,
            "schedule": asdict(self.schedule),
            "optimizer": asdict(self.optimizer),
            "dtype": self.parallel.dtype,
            "numerics": self.parallel.numerics,
        }
        return dict(json.loads(json.dumps(decided)))


@dataclass(frozen=True, kw_only=True)
class TrainFacts:
    """What a training rank says of itself when it is ready."""

    family: str
    dtype: str
    parameters: int  # in this rank's shard
    step: int  # from which it goes on
    tokens: int  # of the corpus


def folder_origin(model: Path) -> str:
    """A digest that tells one checkpoint from another without reading all of it: names, sizes, and the files' ends."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for path in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            file.seek(max(0, size - TAIL_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def claim_folder(spec: TrainSpec) -> Path:
    """The run's folder, new or this very run's; an error for anybody else's."""
    out = Path(spec.out)
    path = out / RUN
    if path.is_file():
        check_run(out, spec, json.loads(path.read_text(encoding="utf-8")))
        return out
    if out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise ConfigError(f"{out} holds files but no {RUN}: it is not a run of this command; choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    draft = out / f".{RUN}.part"
    draft.write_text(json.dumps(spec.run(), indent=1), encoding="utf-8")
    os.replace(draft, path)
    return out


def check_run(where: Path, spec: TrainSpec, saved: Mapping[str, Any]) -> None:
    """Refuses to go on with another run's numbers."""
    mine = spec.run()
    differing = sorted(name for name in mine.keys() | saved.keys() if mine.get(name) != saved.get(name))
    if differing:
        raise ConfigError(
            f"{where} belongs to another run (its {', '.join(differing)} differ); choose another folder, or the "
            "settings of that run"
        )


class TrainRank:
    """One rank of a run."""

    def __init__(self, spec: TrainSpec, place: Place, phases: Phases) -> None:
        self._spec, self._place, self._phases = spec, place, phases
        self._out = Path(spec.out)
        self._stop = threading.Event()
        self._groups: Groups | None = None
        self._lock: IO[str] | None = None

    def start(self) -> TrainFacts:
        spec, phases = self._spec, self._phases
        claim_cores(self._place, spec.parallel.threads, spec.parallel.device)
        with phases("waiting for the run's folder"):
            self._lock = lock(self._out / f".rank-{self._place.rank}.lock")
        with phases("building the kernels"):  # a minute, once per machine and version
            library.available()
        with phases("meeting the other ranks"):
            self._groups = self._meet()
        with phases("tokenizing"):
            dataset = self._dataset()
        with phases("reading weights"):
            self._resume(dataset, self._groups)
        weights = list(self._trainer.model.parameters())
        return TrainFacts(
            family=self._trainer.model.config.model_type, dtype=str(weights[0].dtype).removeprefix("torch."),
            parameters=sum(w.numel() for w in weights), step=self._trainer.step, tokens=dataset.store.num_tokens,
        )  # fmt: skip

    def run(self) -> None:
        """Steps; then, with the last checkpoint complete, waits to be told that nothing more is wanted."""
        saved = self._trainer.step if latest_checkpoint(self._out) else None
        with _Metrics(self._out, self._trainer.step, self._place.rank) as metrics:
            while self._trainer.step < self._spec.steps and not self._stopped():
                entry = self._step()
                if metrics is not None:
                    metrics.write(json.dumps(entry) + "\n")
                    metrics.flush()
                if self._trainer.step % self._spec.save_every == 0:
                    saved = self._save()
        if saved != self._trainer.step:
            self._save()
        self._checkpointer.wait()
        self._stop.wait()

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        if self._groups is not None:
            self._groups.close()
        if self._lock is not None:
            self._lock.close()

    def _meet(self) -> Groups:
        parallel, place = self._spec.parallel, self._place
        wiring = Wiring(
            timeout_s=parallel.collective_timeout_s,
            start_timeout_s=self._spec.start_timeout_s,
            transport=parallel.transport,
        )
        return init_groups(
            place.rank, place.world, parallel.tp, parallel.dp, place.address, wiring=wiring, numerics=parallel.numerics
        )

    def _tell(self, word: bytes) -> bytes:
        """Rank 0's word, on every rank."""
        assert self._groups is not None, "the ranks have met"
        comm = self._groups.tp.comm
        if comm is None:
            return word
        return comm.broadcast_bytes(word if self._place.rank == 0 else None, self._spec.start_timeout_s)

    def _dataset(self) -> PackedDataset:
        """The corpus in tokens: made by rank 0, awaited by the others."""
        corpus, folder = self._spec.corpus, self._out / TOKENS
        if self._place.rank == 0:
            for draft in self._out.glob(".step-*.part"):  # of a killed save: the next one must not meet it
                shutil.rmtree(draft)
            tokenizer = load_tokenizer(self._spec.model)
            if tokenizer is None:
                raise ConfigError(f"{self._spec.model} has no tokenizer; put its files beside the weights")
            store = tokenize_corpus(
                open_source(corpus.path, SourceOptions(separator=corpus.separator)), tokenizer, folder
            )
        self._tell(b"tokenized")
        store = store if self._place.rank == 0 else TokenStore.open(folder)
        return PackedDataset(store, tokens_per_sample=corpus.tokens_per_sample, seed=corpus.seed)

    def _resume(self, dataset: PackedDataset, groups: Groups) -> None:
        """Model, optimiser and place in the data: the newest checkpoint's, or a beginning."""
        import torch

        spec = self._spec
        newest = latest_checkpoint(self._out)
        saved = read_state(newest) if newest else None
        if saved is not None:
            check_run(saved.folder, spec, saved.extra.get("run", {}))
        dtype = getattr(torch, spec.parallel.dtype) if spec.parallel.dtype else None
        model = load(newest or spec.model, group=groups.tp, dtype=dtype)
        model.source = Path(spec.model)  # whose tokenizer goes into every checkpoint: the newest will be pruned
        self._trainer = Trainer(model, groups, TrainerConfig(optimizer=spec.optimizer))
        state = None
        if saved is not None:
            restore_optimizer(saved.folder, model, self._trainer.optimizer, groups)
            state = DataState.from_json(saved.extra.get("data"))
        self._loader = Loader(dataset, state, batch_size=spec.corpus.batch_size)
        self._checkpointer = Checkpointer(self._out, groups, keep=spec.keep, timeout_s=spec.start_timeout_s)

    def _stopped(self) -> bool:
        """Whether rank 0 was told to stop: one answer for all, so that all take the same steps."""
        return self._tell(b"stop" if self._stop.is_set() else b"go on") == b"stop"

    def _step(self) -> dict[str, float]:
        """One optimiser step, as its line of metrics."""
        began = time.perf_counter()
        batch = next(self._loader)
        rate = self._spec.schedule(self._trainer.step)
        passed = self._trainer.forward_backward(
            TrainBatch(
                token_ids=batch.token_ids, targets=batch.targets, weights=batch.loss_weights, lengths=batch.lengths,
                normaliser=float(batch.global_weight),
            )
        )  # fmt: skip
        done = self._trainer.optim_step(rate)
        seconds = time.perf_counter() - began
        return {
            "step": done.step, "loss": passed.loss, "grad_norm": done.grad_norm, "learning_rate": rate,
            "tokens": batch.global_tokens, "seconds": seconds, "tokens_per_s": batch.global_tokens / seconds,
        }  # fmt: skip

    def _save(self) -> int:
        extra = {"run": self._spec.run(), "data": self._loader.state.to_json()}
        self._checkpointer.save(self._trainer.model, self._trainer.optimizer, extra)
        return self._trainer.step


def lock(path: Path, timeout_s: float = LOCK_S) -> IO[str]:
    """Holds a file for as long as this process lives: two jobs never write into one folder."""
    file = path.open("w", encoding="utf-8")
    limit = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if time.monotonic() > limit:
                file.close()
                raise ConfigError(
                    f"another job is training in {path.parent}; wait for it, or choose another folder"
                ) from error
            time.sleep(0.1)


class _Metrics:
    """Rank 0's file of metrics, cut back to the step that is resumed from; None on the others."""

    def __init__(self, out: Path, step: int, rank: int) -> None:
        self._path, self._step, self._rank = out / METRICS, step, rank
        self._file: IO[str] | None = None

    def __enter__(self) -> IO[str] | None:
        if self._rank != 0:
            return None
        kept = [line for line in read_metrics(self._path) if line["step"] <= self._step]
        draft = self._path.with_name(f".{METRICS}.part")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(draft, self._path)
        self._file = self._path.open("a", encoding="utf-8")
        return self._file

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The complete lines of a file of metrics; a killed job may have left half a last one."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]
