"""What a training run is made of: first weights, text, schedule, layout, and what is shown of it on the way.

Values that pickle and check themselves; the command line and presets fill them in, the ranks read them. Knows no Ray.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from cluster.actors.programs.serve_spec import Dtype, MptReference, ParallelConfig
from cluster.engine.request import SamplingParams
from cluster.training.data.batches.eval_split import SplitRule
from cluster.training.data.batches.labelled_texts import LabelConfig
from cluster.training.data.corpus.sources import SourceOptions
from cluster.training.job.skipped_batches import OnNonFinite
from cluster.training.step.lr_schedule import Schedule
from cluster.training.step.optimizer import OptimizerConfig
from parallel.errors import ConfigError
from parallel.options import Recompute, check_backend, check_recompute
from tp_decoders.model.lora_config import LoraConfig
from tp_decoders.model.task_config import CAUSAL, SEQUENCES

READING = ("kind", "encoding", "field", "prompt_field", "dataset_split")
"""Settings of a corpus that not every run has; where one has none of them its record is as before there were any."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which text, how it is cut into batches, and which part of it is held out."""

    path: str  # a file or a folder
    kind: str | None = None  # text, jsonl, csv or table; None: as the files' names say
    encoding: str | None = None  # of text, JSON lines and CSV; None: utf-8
    separator: str | None = None  # between documents of a text file; None: a file is one document
    tokens_per_sample: int = 128  # a row of a batch; short documents share one
    batch_size: int = 8  # samples of one step, over all replicas
    seed: int = 0  # of the order of documents
    split: SplitRule = field(default_factory=SplitRule)
    field: str | None = None  # of JSON lines, CSV and tables: what to learn; None: text
    prompt_field: str | None = None  # of JSON lines, CSV and tables: what comes before it and is not learned
    dataset_split: str | None = None  # one split of a dataset's folder

    def __post_init__(self) -> None:
        for name in ("tokens_per_sample", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"corpus.{name} is {getattr(self, name)}; give at least 1")

    @property
    def source_options(self) -> SourceOptions:
        return SourceOptions(
            kind=self.kind, encoding=self.encoding, separator=self.separator, field=self.field,
            prompt_field=self.prompt_field, split=self.dataset_split,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What the model is asked to continue whenever it is evaluated. temperature 0 is greedy."""

    prompts: tuple[str, ...] = ()  # to be continued
    max_tokens: int = 48  # of a continuation
    temperature: float = 0.0  # 0 is greedy
    top_k: int | None = None  # keep so many
    top_p: float | None = None  # keep so much probability
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"samples.max_tokens is {self.max_tokens}; give at least 1")
        if self.temperature < 0:
            raise ConfigError(f"samples.temperature is {self.temperature}; give 0 for greedy, or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"samples.top_k is {self.top_k}; give at least 1, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"samples.top_p is {self.top_p}; give a number above 0, at most 1, or leave it out")

    def params(self) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class TrainParallel(ParallelConfig):
    """How a model is spread, `tp` ranks to a replica and `dp` replicas, and in what type it computes (None: the
    checkpoint's own).
    """

    dp: int = 1  # replicas, which share a batch
    sequence_parallel: bool = False  # divide activations between the sharded layers by tokens
    dtype: Dtype | None = None  # of what is computed; masters are float32
    collective_timeout_s: float = 60.0  # a rank that waits longer for the others gives them up

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype == "float16":
            raise ConfigError("parallel.dtype is 'float16', whose gradients underflow; choose 'bfloat16' or 'float32'")

    @property
    def world(self) -> int:
        return self.tp * self.dp


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run learns, and how: what a preset says of it and its ranks are told."""

    out: str  # the run's folder
    corpus: CorpusConfig
    schedule: Schedule
    steps: int  # in all
    task: str = CAUSAL  # causal-lm or sequence-classification
    mpt_reference: MptReference = "auto"  # whose rules an MPT file follows; auto: by its origin
    labels: LabelConfig = field(default_factory=LabelConfig)  # of sequence-classification
    save_every: int = 100  # steps between checkpoints
    keep: int = 2  # checkpoints that stay
    micro_batch_tokens: int | None = None  # of one forward and backward, per replica; None: all of its share at once
    recompute: Recompute = "none"  # what a backward pass computes again
    attention_backend: str | None = None  # eager, cpu, sdpa or flash
    dropout: bool = True  # as config.json says; false: none
    lora: LoraConfig | None = None  # train adapters of this shape, and nothing else
    eval_every: int | None = None  # steps between evaluations and samples, which also follow the last step
    eval_batches: int = 8  # of one evaluation
    samples: SampleConfig = field(default_factory=SampleConfig)
    tensorboard: bool = False  # event files beside metrics.jsonl
    peak_flops: float | None = None  # of one rank, that utilisation is relative to; None: measured at the start
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: TrainParallel = field(default_factory=TrainParallel)
    on_nonfinite: OnNonFinite = "stop"  # a batch whose loss or gradient is not finite: end the run, or leave it out
    max_skipped_in_a_row: int = 3  # more end the run
    max_skipped: int = 20  # of the whole run

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "keep", "eval_batches", "eval_every", "micro_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give at least 1")
        check_recompute(self.recompute)
        check_backend("attention_backend", self.attention_backend, self.parallel.device)
        self._check_nonfinite()
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ConfigError(f"peak_flops is {self.peak_flops}; give floating-point operations per second above 0")
        if self.optimizer.learning_rate != OptimizerConfig.learning_rate:
            raise ConfigError("optimizer.learning_rate has no effect beside a schedule; set schedule.learning_rate")
        if self.corpus.batch_size < self.parallel.dp:
            raise ConfigError(
                f"corpus.batch_size is {self.corpus.batch_size}, less than parallel.dp {self.parallel.dp}: every "
                "replica needs a sample; raise the first or lower the second"
            )
        if self.lora is not None and self.lora.dropout and not self.dropout:
            raise ConfigError("lora.dropout has no effect where dropout is false; leave out the one or the other")
        self._check_evaluation()
        self._check_task()

    def _check_nonfinite(self) -> None:
        if self.on_nonfinite not in get_args(OnNonFinite):
            raise ConfigError(f"on_nonfinite is {self.on_nonfinite!r}; choose one of {list(get_args(OnNonFinite))}")
        for name in ("max_skipped_in_a_row", "max_skipped"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1, or on_nonfinite=stop")

    def _check_evaluation(self) -> None:
        if self.eval_every is None:
            if self.samples.prompts:
                raise ConfigError("samples.prompts has no effect without eval_every; set it, or leave the prompts out")
        elif self.corpus.split.eval_fraction == 0.0 and not self.samples.prompts:
            raise ConfigError(
                "eval_every is set, but nothing is held out and nothing is asked; set corpus.split.eval_fraction, as "
                "in 0.05, or samples.prompts"
            )

    def _check_task(self) -> None:
        """A job learns language, or classes of texts."""
        if self.task not in (CAUSAL, SEQUENCES):
            raise ConfigError(f"task {self.task!r} is not a job's; choose {CAUSAL} or {SEQUENCES}, or train over gRPC")
        if self.task == CAUSAL and self.labels != LabelConfig():
            raise ConfigError(f"labels are set, but task is {CAUSAL}; set task={SEQUENCES}, or leave them out")
        if self.task == CAUSAL and self.corpus.tokens_per_sample < 2:
            raise ConfigError("corpus.tokens_per_sample is 1, which leaves nothing to predict; give at least 2")
        if self.task == SEQUENCES:
            prompts, separator = self.samples.prompts, self.corpus.separator
            unfit = {"samples.prompts": prompts, "lora": self.lora, "corpus.separator": separator}
            unfit |= {f"corpus.{name}": getattr(self.corpus, name) for name in READING}
            for name in (name for name, value in unfit.items() if value):
                raise ConfigError(f"{name} is not for task {self.task}; leave it out")


@dataclass(frozen=True, kw_only=True)
class TrainSpec(RunConfig):
    """One run, as its ranks know it. `origin` says which weights it starts from, wherever `model` lies."""

    model: str  # a checkpoint
    origin: str
    start_timeout_s: float = 600.0
    weights_cache: str | None = None  # a folder of each node for copies of the weights it starts from

    def run(self) -> dict[str, Any]:
        """Everything that decides the run's numbers but how long it goes on and how it is spread over ranks."""
        left_out = {"path", *(name for name in READING if getattr(self.corpus, name) is None)}
        corpus = {name: value for name, value in asdict(self.corpus).items() if name not in left_out}
        decided = {
            "origin": self.origin,
            "corpus": corpus,
            "schedule": asdict(self.schedule),
            "optimizer": asdict(self.optimizer),
            "dtype": self.parallel.dtype,
            "numerics": self.parallel.numerics,
            "dropout": self.dropout,
            "lora": None if self.lora is None else asdict(self.lora),
        }
        if self.mpt_reference != "auto":
            decided |= {"mpt_reference": self.mpt_reference}
        if self.task != CAUSAL:
            decided |= {"task": self.task, "labels": asdict(self.labels)}
        return dict(json.loads(json.dumps(decided)))


@dataclass(frozen=True, kw_only=True)
class TrainFacts:
    """What a training rank says of itself when it is ready."""

    family: str
    dtype: str
    parameters: int  # of the whole model
    step: int  # from which it goes on
    tokens: int  # of the corpus
    peak_flops: float  # of this rank
    peak_source: str  # where that figure is from
    notes: tuple[str, ...] = ()  # what the user should know before it begins
