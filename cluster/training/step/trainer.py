"""One rank's trainer: forward and backward over packed sequences, then an optimiser step, on the very model that
serves.

    TrainBatch -> micro-batches of whole sequences -> model(tokens, Pass.packed(lengths)) -> log-probabilities of the
    targets -> loss -> backward (gradients add up in the optimiser) -> step

The loss is normalised over the GLOBAL batch, so gradients of micro-batches and of data-parallel ranks only have to
be added. Knows no file, no client and no schedule: the learning rate comes with each step. `weight_version` counts
the steps applied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from cluster.engine.engine_builder import attention_for
from cluster.training.step.losses import LossInputs, LossOptions, LossTerms, compute_loss
from cluster.training.step.optimizer import OptimizerConfig, ShardedAdamW
from cluster.training.step.task_losses import task_terms
from cluster.training.step.train_batch import TrainBatch, keyed, together
from cluster.training.train_calls import TASK
from parallel.attention.forward_pass import Pass
from parallel.errors import ConfigError
from parallel.layers.dropout import Dropping
from parallel.options import Recompute, check_recompute
from parallel.ranks.mesh import Groups
from parallel.vocabulary.cross_entropy import IGNORE_INDEX, vocab_token_losses
from tp_decoders.model.decoder import Decoder

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How a step is computed; none of it changes its result beyond the order in which micro-batches are added."""

    optimizer: OptimizerConfig = OptimizerConfig()
    micro_batch_tokens: int | None = None
    recompute: Recompute = "none"
    attention_backend: str | None = None

    def __post_init__(self) -> None:
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise ConfigError(f"micro_batch_tokens is {self.micro_batch_tokens}; give at least 1, or leave it out")
        check_recompute(self.recompute)


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """What a forward and backward over a batch gave: this dp group's sums."""

    loss: float
    tokens: int
    logprobs: Tensor  # [T] float32, detached, one per target (0 where ignored)
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """An applied optimiser step."""

    step: int
    grad_norm: float
    learning_rate: float
    weight_version: int
    seconds: float = 0.0


Parts = Generator[None, None, T]
"""Work in parts: whoever drives it may do something else between two of them."""


def finish(parts: Parts[T]) -> T:
    """All of it at once."""
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return end.value


def _nothing() -> None:
    """There is nothing to wait for."""


class Trainer:
    """Trains a model in place. All tensor-parallel ranks call the same methods with the same batches."""

    def __init__(self, model: Decoder, groups: Groups, config: TrainerConfig) -> None:
        self.model, self.groups, self.config = model, groups, config
        if config.attention_backend is not None:
            attention_for(model, config.attention_backend)  # refused here, not in the first step
        self.optimizer = ShardedAdamW(model, groups.tp, groups.dp, config.optimizer)
        self.weight_version = 0
        self.before_update: Callable[[], None] = _nothing  # on all ranks at once, before weights and moments change
        model.recompute = config.recompute

    @property
    def step(self) -> int:
        """Optimiser steps applied so far."""
        return self.optimizer.steps

    def forward_backward(
        self,
        batch: TrainBatch,
        loss: str = "cross_entropy",
        options: LossOptions = LossOptions(),
        dropout_seed: int | None = None,
    ) -> PassResult:
        """Adds the batch's gradients to those waiting for the next step. With a seed (another for each step, the same
        on all ranks) activations are dropped with the model's probabilities; log-probabilities are those of that pass.
        """
        return finish(self.in_parts(batch, loss, options, dropout_seed))

    def evaluate(
        self, batch: TrainBatch, loss: str = "cross_entropy", options: LossOptions = LossOptions()
    ) -> PassResult:
        """The same without gradients."""
        return finish(self.in_parts(batch, loss, options, backward=False))

    def optim_step(self, learning_rate: float | None = None, config: OptimizerConfig | None = None) -> StepResult:
        """Applies the waiting gradients."""
        started = time.perf_counter()
        config = config or self.config.optimizer
        if learning_rate is not None:
            config = replace(config, learning_rate=learning_rate)
        self.before_update()
        norm = self.optimizer.step(config)
        self.weight_version += 1
        return StepResult(
            step=self.step, grad_norm=norm, learning_rate=config.learning_rate, weight_version=self.weight_version,
            seconds=time.perf_counter() - started,
        )  # fmt: skip

    def in_parts(
        self,
        batch: TrainBatch,
        loss: str = "cross_entropy",
        options: LossOptions = LossOptions(),
        dropout_seed: int | None = None,
        backward: bool = True,
    ) -> Parts[PassResult]:
        """`forward_backward`, or `evaluate`, that yields between micro-batches: no graph is alive then, no mode set,
        and the model may do anything else that changes no weight.
        """
        total, seconds, logprobs = 0.0, 0.0, []
        metrics: dict[str, float] = {}
        parts = keyed(batch, dropout_seed).parts(self.config.micro_batch_tokens, together(batch, loss))
        for number, part in enumerate(parts):
            if number:
                yield None
            started = time.perf_counter()
            with torch.set_grad_enabled(backward):
                terms, part_logprobs = self._loss(part, loss, options, dropout_seed)
                if backward:
                    terms.loss.backward()
            total += float(terms.loss.detach())
            logprobs.append(part_logprobs)
            for name, value in terms.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + float(value)
            seconds += time.perf_counter() - started
        return PassResult(
            loss=total, tokens=len(batch.token_ids), logprobs=torch.cat(logprobs), metrics=metrics, seconds=seconds
        )

    def _loss(
        self, part: TrainBatch, loss: str, options: LossOptions, dropout_seed: int | None
    ) -> tuple[LossTerms, Tensor]:
        dropping = None
        if dropout_seed is not None and self.model.drops:
            assert part.keys is not None, "made for the whole batch"
            dropping = Dropping(dropout_seed, part.keys)
        backend, device = self.config.attention_backend, part.token_ids.device
        now = Pass.packed(part.lengths, backend=backend, dropping=dropping, device=device)
        if loss == TASK:
            return task_terms(self.model, part, now, options)
        logits = self.model(part.token_ids, now)
        logprobs = -vocab_token_losses(logits, part.targets, self.model.head.shards, self.groups.tp)
        weights = torch.where(part.targets == IGNORE_INDEX, torch.zeros_like(part.weights), part.weights)
        inputs = LossInputs(
            logprobs=logprobs, weights=weights, lengths=part.lengths, normaliser=part.normaliser,
            old_logprobs=part.old_logprobs, advantages=part.advantages, reference_logprobs=part.reference_logprobs,
        )  # fmt: skip
        return compute_loss(loss, inputs, options), logprobs.detach()
