"""Training runs for the tests: the same tiny model, data and hyper-parameters, here and in plain transformers and
torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tp_decoders
from cluster.training.step.optimizer import OptimizerConfig
from cluster.training.step.train_batch import TrainBatch
from cluster.training.step.trainer import Trainer, TrainerConfig
from parallel.layers.dropout import token_keys
from parallel.options import Recompute
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups, init_groups

VOCAB = 97
# A larger epsilon than usual: the true gradient of a key bias is zero, and Adam would blow its rounding noise up to
# full steps.
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=1.0, epsilon=1e-5)
DOCUMENTS = (9, 4, 13, 6)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is divided and computed."""

    tp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    micro_batch_tokens: int | None = None
    dropout: bool = False

    @property
    def name(self) -> str:
        extras = [n for n in ("sequence_parallel", "micro_batch_tokens", "dropout") if getattr(self, n)]
        recompute = [] if self.recompute == "none" else [f"{self.recompute} recompute"]
        return "+".join([f"tp{self.tp}xdp{self.dp}", *extras, *recompute])


def documents(step: int) -> list[Tensor]:
    """The documents of one global batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in DOCUMENTS]


def batch_of(parts: list[Tensor], normaliser: float) -> TrainBatch:
    targets = [torch.cat([part[1:], torch.tensor([-100])]) for part in parts]
    tokens = torch.cat(parts)
    return TrainBatch(
        token_ids=tokens, targets=torch.cat(targets), weights=torch.ones(len(tokens)), lengths=tuple(map(len, parts)),
        normaliser=normaliser,
    )  # fmt: skip


NORMALISER = float(sum(DOCUMENTS) - len(DOCUMENTS))


def make_trainer(layout: Layout, groups: Groups, folder: str, dtype: torch.dtype) -> Trainer:
    groups = replace(groups, tp=replace(groups.tp, sequence_parallel=layout.sequence_parallel))
    model = tp_decoders.load(folder, group=groups.tp, dtype=dtype)
    config = TrainerConfig(
        optimizer=OPTIMIZER, recompute=layout.recompute, micro_batch_tokens=layout.micro_batch_tokens
    )
    return Trainer(model, groups, config)


def advance(trainer: Trainer, groups: Groups, steps: int, dropout: bool = False) -> Iterator[tuple[float, float]]:
    """(this dp rank's loss, gradient norm) of each step."""
    for _ in range(steps):
        parts = documents(trainer.step)
        share = -(-len(parts) // groups.dp.size)
        first, last = groups.dp.rank * share, min(len(parts), (groups.dp.rank + 1) * share)
        batch = batch_of(parts[first:last], NORMALISER)
        batch = replace(batch, keys=token_keys(range(first, last), batch.lengths))
        loss = trainer.forward_backward(batch, dropout_seed=trainer.step if dropout else None).loss
        yield loss, trainer.optim_step().grad_norm


def run(
    group: Group, folder: str, layout: Layout, steps: int, address: str, out: str | None, dtype: torch.dtype
) -> Any:
    """One rank of a run: (losses, norms, sha-256 of the full weights on rank 0)."""
    groups = (
        init_groups(group.rank, group.size, layout.tp, layout.dp, address)
        if layout.dp > 1
        else Groups(group, Group.single())
    )
    trainer = make_trainer(layout, groups, folder, dtype)
    history = list(advance(trainer, groups, steps, layout.dropout))
    if out is not None and groups.dp.rank == 0:
        tp_decoders.save(trainer.model, Path(out))
    return history, digest(trainer, groups)


def digest(trainer: Trainer, groups: Groups) -> str | None:
    from tp_decoders.checkpoint.load_save import full_tensor

    whole = hashlib.sha256()
    for _, parameter in sorted(trainer.model.named_parameters()):
        full = full_tensor(parameter, groups.tp)
        if full is not None:
            whole.update(full.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest() if groups.tp.rank == 0 else None


def reference(model: Any, steps: int) -> tuple[list[float], list[float]]:
    """The same run in plain transformers and torch; trains the model in place."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    adam = torch.optim.AdamW(
        [{"params": decay, "weight_decay": OPTIMIZER.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=OPTIMIZER.learning_rate, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.epsilon,
    )  # fmt: skip
    losses, norms = [], []
    for step in range(steps):
        total = 0.0
        for document in documents(step):
            logits = model(document[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum") / NORMALISER
            loss.backward()
            total += float(loss.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm or 1.0)))
        adam.step()
        adam.zero_grad()
        losses.append(total)
    return losses, norms
