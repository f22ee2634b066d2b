"""A rank that trains: meets the others, loads its shard, resumes where its folder's newest checkpoint stands, and
takes steps until the last one or until told to stop, evaluating and sampling on the way.

Ranks are tp x dp (see parallel.ranks.mesh); what they leave in the run's folder is in cluster.training.job.run_folder.
A `Program` (see worker.py) without Ray. It draws nothing: the loss plot is made of its metrics.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch

from cluster.actors.group.placement import Place
from cluster.actors.group.worker import Phases
from cluster.actors.host.cpu_affinity import claim_cores
from cluster.actors.host.load_progress import reading
from cluster.actors.programs.train_records import RunRecords
from cluster.actors.programs.train_spec import TrainFacts, TrainSpec
from cluster.training.checkpoint.checkpointer import (
    Checkpointer,
    SavedState,
    latest_checkpoint,
    read_state,
    restore_optimizer,
    sound_checkpoint,
)
from cluster.training.data.batches.data_loader import Loader, RowDataset
from cluster.training.data.batches.data_state import DataState
from cluster.training.data.batches.labelled_texts import LabelledDataset, LabelledStore, store_labelled
from cluster.training.data.batches.packing import PackedDataset
from cluster.training.data.corpus.document import NothingHeldOut
from cluster.training.data.corpus.sources import open_source
from cluster.training.data.store.token_store import TokenStore
from cluster.training.data.store.tokenize_corpus import tokenize_corpus
from cluster.training.job.packed_steps import Speed, held_out, summed, take_step
from cluster.training.job.run_folder import TOKENS, check_run, lock
from cluster.training.job.sample_text import Prompts, sample_live
from cluster.training.job.skipped_batches import BatchPlace, SkippedBatches
from cluster.training.step.flops import ModelFlops, num_parameters, product_ceiling, product_name
from cluster.training.step.nonfinite_errors import PoisonBatch
from cluster.training.step.trainer import Trainer, TrainerConfig
from parallel.errors import ConfigError
from parallel.native.compiled import library
from parallel.ranks.mesh import Groups, Wiring, init_groups
from tp_decoders import load
from tp_decoders.adapters.lora import attach
from tp_decoders.adapters.peft_files import load_adapter
from tp_decoders.files.json_fields import Fields
from tp_decoders.hub.repository import here
from tp_decoders.model.task_config import CAUSAL, SINGLE_LABEL
from tp_decoders.registry import read_config
from tp_decoders.tasks.task_settings import label_names, task_of
from tp_decoders.text.tokenizer import Tokenizer, load_tokenizer

Store = TokenStore | LabelledStore


class TrainRank:
    """One rank of a run."""

    def __init__(self, spec: TrainSpec, place: Place, phases: Phases) -> None:
        self._spec, self._place, self._phases = spec, place, phases
        self._device = torch.device("cuda", 0) if spec.parallel.device == "cuda" else torch.device("cpu")
        self._out, self._folder = Path(spec.out), spec.model
        self._stop = threading.Event()
        self._groups: Groups | None = None
        self._lock: IO[str] | None = None
        self._records: RunRecords | None = None
        self._notes: tuple[str, ...] = ()

    def start(self) -> TrainFacts:
        self._folder = str(here(self._spec.model))  # a snapshot of the hub's, on this node
        spec, phases = self._spec, self._phases
        claim_cores(self._place, spec.parallel.threads, spec.parallel.device)
        with phases("waiting for the run's folder"):
            self._lock = lock(self._out / f".rank-{self._place.rank}.lock")
        with phases("building the kernels"):  # a minute, once per machine and version
            library.available()
        with phases("meeting the other ranks"):
            self._groups = self._meet()
        with phases("tokenizing"):
            tokenizer = self._tokenizer()
            store = self._tokens(tokenizer)
        with phases("reading weights"):
            self._resume(store, self._groups)
            context = self._trainer.model.config.max_positions
            self._prompts = Prompts(spec.samples.prompts, tokenizer, context, spec.samples.max_tokens)
        with phases("measuring the machine"):
            peak, source = self._measure(self._groups)
        self._records = RunRecords(spec, self._place.rank, self._trainer.step)
        model = self._trainer.model
        return TrainFacts(
            family=model.config.model_type, dtype=str(self._dtype).removeprefix("torch."),
            parameters=num_parameters(model), step=self._trainer.step, tokens=store.num_tokens,
            peak_flops=peak, peak_source=source, notes=self._notes,
        )  # fmt: skip

    def run(self) -> None:
        """Steps; then, with the last checkpoint complete, waits to be told that nothing more is wanted."""
        assert self._records is not None, "started"
        saved = self._trainer.step if latest_checkpoint(self._out) else None
        while self._trainer.step < self._spec.steps and not self._stopped():
            record = self._step(self._records)
            self._records.step(record | self._evaluate(self._records))
            if self._trainer.step % self._spec.save_every == 0:
                saved = self._save()
        if saved != self._trainer.step:
            self._save()
        self._checkpointer.wait()
        self._stop.wait()

    def _step(self, records: RunRecords) -> dict[str, float]:
        """The next step, with the next batch that has finite numbers."""
        while True:
            before, batch = self._loader.state, next(self._loader)
            rate = self._spec.schedule(self._trainer.step)
            try:
                record = take_step(self._trainer, batch, rate, self._speed, dropout_seed(self._spec))
            except PoisonBatch as error:
                place = BatchPlace.of(before, batch)
                records.skipped(self._skips.skip(self._trainer.step + 1, place, error))
            else:
                return record | self._skips.taken()

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        if self._groups is not None:
            self._groups.close()
        if self._records is not None:
            self._records.close()
        if self._lock is not None:
            self._lock.close()

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._trainer.model.parameters()).dtype

    def _meet(self) -> Groups:
        parallel, place = self._spec.parallel, self._place
        wiring = Wiring(
            device=self._device,
            timeout_s=parallel.collective_timeout_s,
            start_timeout_s=self._spec.start_timeout_s,
            transport=parallel.transport,
            key=place.key,
        )
        groups = init_groups(
            place.rank, place.world, parallel.tp, parallel.dp, place.address, wiring=wiring, numerics=parallel.numerics
        )
        return replace(groups, tp=replace(groups.tp, sequence_parallel=parallel.sequence_parallel))

    def _tell(self, word: bytes) -> bytes:
        """Rank 0's word, on every rank: along its own replica, then from there to the other replicas."""
        assert self._groups is not None, "the ranks have met"
        limit = self._spec.start_timeout_s
        tp, dp = self._groups.tp, self._groups.dp
        if tp.size > 1 and dp.rank == 0:
            word = tp.talk.broadcast_bytes(word if tp.rank == 0 else None, limit)
        if dp.size > 1:
            word = dp.talk.broadcast_bytes(word if dp.rank == 0 else None, limit)
        return word

    def _tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self._folder)
        if tokenizer is None:
            raise ConfigError(f"{self._folder} has no tokenizer; put its files beside the weights")
        return tokenizer

    def _tokens(self, tokenizer: Tokenizer) -> Store:
        """The corpus in tokens: made by rank 0, awaited by the others."""
        folder = self._out / TOKENS
        if self._place.rank != 0:
            self._tell(b"")
            return TokenStore.open(folder) if self._spec.task == CAUSAL else LabelledStore.open(folder)
        for draft in self._out.glob(".step-*.part"):  # of a killed save: the next one must not meet it
            shutil.rmtree(draft)
        store = self._tokenized(tokenizer, folder)
        self._tell(b"tokenized")
        return store

    def _tokenized(self, tokenizer: Tokenizer, folder: Path) -> Store:
        corpus = self._spec.corpus
        if self._spec.task != CAUSAL:
            hf = read_config(self._folder, unread="ignore").hf
            known = label_names(Fields(hf, "config.json")) if task_of(hf) == self._spec.task else ()
            labels = replace(self._spec.labels, names=self._spec.labels.names or known)
            return store_labelled(Path(corpus.path), labels, tokenizer, folder)
        return tokenize_corpus(open_source(corpus.path, corpus.source_options), tokenizer, folder)

    def _dataset(self, store: Store, part: str) -> RowDataset:
        corpus = self._spec.corpus
        if isinstance(store, LabelledStore):
            return LabelledDataset(
                store, max_tokens=corpus.tokens_per_sample, seed=corpus.seed, split=corpus.split, part=part,
                shuffle=part == "train",
            )  # fmt: skip
        return PackedDataset(
            store, tokens_per_sample=corpus.tokens_per_sample, seed=corpus.seed, split=corpus.split, part=part,
            shuffle=part == "train",
        )  # fmt: skip

    def _resume(self, store: Store, groups: Groups) -> None:
        """Model, optimiser and place in the data: the newest checkpoint's, or a beginning."""
        spec = self._spec
        newest = self._newest()
        saved = read_state(newest) if newest else None
        if saved is not None:
            check_run(saved.folder, spec.run(), saved.extra.get("run", {}))
        self._trainer = self._make_trainer(saved, groups, store.names if isinstance(store, LabelledStore) else None)
        state = DataState.from_json(saved.extra.get("data")) if saved else None
        skipped = int(saved.extra.get("skipped", 0)) if saved else 0
        self._skips = SkippedBatches(spec.on_nonfinite, spec.max_skipped_in_a_row, spec.max_skipped, skipped)
        self._loader = Loader(
            self._dataset(store, "train"), state, batch_size=spec.corpus.batch_size, dp_rank=groups.dp.rank,
            dp_size=groups.dp.size,
        )  # fmt: skip
        self._held_out = self._evaluated(store)
        self._checkpointer = Checkpointer(self._out, groups, keep=spec.keep, timeout_s=spec.start_timeout_s)
        self._trainer.before_update = self._checkpointer.settle

    def _evaluated(self, store: Store) -> RowDataset | None:
        """What evaluations read. A preset's share of a small corpus may come to nothing: the run goes on without."""
        split = self._spec.corpus.split
        if self._spec.eval_every is None or split.eval_fraction == 0:
            return None
        try:
            return self._dataset(store, "eval")
        except NothingHeldOut:
            words = f"corpus.split.eval_fraction={split.eval_fraction:g} holds nothing of this corpus out"
            self._notes += (f"{words}: there is no held-out loss; raise it, or set corpus.split.unit=piece",)
            return None

    def _newest(self) -> Path | None:
        """The checkpoint to go on from: rank 0 compares checksums, for all."""
        found = sound_checkpoint(self._out) if self._place.rank == 0 else None
        name = self._tell(found.name.encode() if found else b"-").decode()
        return None if name == "-" else self._out / name

    def _make_trainer(self, saved: SavedState | None, groups: Groups, labels: Sequence[str] | None) -> Trainer:
        """The model and its optimiser, as a checkpoint or the first weights have them."""
        spec = self._spec
        dtype = getattr(torch, spec.parallel.dtype) if spec.parallel.dtype else None
        whole = saved.folder if saved and spec.lora is None else self._folder  # an adapter's checkpoints hold no base
        problem = None if labels is None else SINGLE_LABEL
        kept = spec.weights_cache if str(whole) == self._folder else None  # a run's own checkpoints are read but once
        cache, told = reading(self._place, str(whole), kept)
        model = load(
            whole, spec.task, groups.tp, dtype, self._device, labels=labels, problem=problem,
            mpt_reference=spec.mpt_reference, cache=cache, progress=told,
        )  # fmt: skip
        model.source = Path(self._folder)  # whose tokenizer goes into every checkpoint: the newest will be pruned
        if spec.lora is not None and saved is not None:
            load_adapter(model, saved.folder, trainable=True)
        elif spec.lora is not None:
            attach(model, spec.lora, seed=spec.corpus.seed)
        trainer = Trainer(model, groups, trainer_config(spec))
        if saved is not None:
            restore_optimizer(saved.folder, model, trainer.optimizer, groups)
        return trainer

    def _measure(self, groups: Groups) -> tuple[float, str]:
        """What this rank could compute in a second at most, and where that figure is from."""
        peak, source = self._spec.peak_flops, "peak_flops of the configuration"
        if peak is None:
            peak, source = product_ceiling(self._device, self._dtype), product_name(self._device, self._dtype)
        total = [peak]
        for group in (groups.tp, groups.dp):
            total = summed(total, group, self._device)
        self._speed = Speed(flops=ModelFlops.of(self._trainer.model), peak=total[0])
        return peak, source

    def _stopped(self) -> bool:
        """Whether rank 0 was told to stop: one answer for all, so that all take the same steps."""
        return self._tell(b"stop" if self._stop.is_set() else b"go on") == b"stop"

    def _evaluate(self, records: RunRecords) -> dict[str, float]:
        """Where it is time: the held-out loss, for the step's record, and samples, into theirs."""
        spec, step = self._spec, self._trainer.step
        if spec.eval_every is None or (step % spec.eval_every and step != spec.steps):
            return {}
        if self._prompts.ids and self._trainer.groups.dp.rank == 0:
            answers = sample_live(
                self._trainer.model, self._prompts, spec.samples.params(),
                attention_backend=spec.attention_backend, timeout_s=spec.parallel.collective_timeout_s,
            )  # fmt: skip
            records.samples(step, answers or [])
        if self._held_out is None:
            return {}
        batch_size = spec.corpus.batch_size
        return held_out(self._trainer, self._held_out, batch_size, spec.eval_batches)

    def _save(self) -> int:
        extra = {"run": self._spec.run(), "data": self._loader.state.to_json(), "skipped": self._skips.total}
        self._checkpointer.save(self._trainer.model, self._trainer.optimizer, extra)
        return self._trainer.step


def dropout_seed(spec: TrainSpec) -> int | None:
    """By which activations are dropped, if they are; the same on every rank."""
    return spec.corpus.seed if spec.dropout else None


def trainer_config(spec: TrainSpec) -> TrainerConfig:
    """What of a run is the trainer's business."""
    return TrainerConfig(
        optimizer=spec.optimizer, micro_batch_tokens=spec.micro_batch_tokens, recompute=spec.recompute,
        attention_backend=spec.attention_backend,
    )  # fmt: skip
