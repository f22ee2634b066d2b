"""Who writes to the weights of a model in use, and that no packed form of them is served after that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.training.step.optimizer import OptimizerConfig
from cluster.training.step.train_batch import TrainBatch
from cluster.training.step.trainer import Trainer, TrainerConfig
from parallel.attention.forward_pass import Pass
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from tests.cluster.engine.tiny_models import VOCAB, save_tiny
from tp_decoders import load
from tp_decoders.adapters.lora import attach, merge, unmerge
from tp_decoders.checkpoint.load_save import initialise
from tp_decoders.model.decoder import Decoder
from tp_decoders.model.lora_config import LoraConfig
from tp_decoders.model.pruning import prune_heads

TOKENS = torch.arange(1, 12)


def logits_of(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, Pass.packed([len(TOKENS)]))  # type: ignore[no-any-return]


def checked(model: Decoder, before: Tensor) -> Tensor:
    """What it computes now, which is what a copy does that has nothing packed, and not what it was."""
    now = logits_of(model)
    assert torch.equal(now, logits_of(copy.deepcopy(model)))
    assert not torch.equal(now, before)
    return now


def step(model: Decoder) -> None:
    trainer = Trainer(
        model, Groups(Group.single(), Group.single()), TrainerConfig(optimizer=OptimizerConfig(learning_rate=0.1))
    )
    targets = TOKENS % VOCAB
    batch = TrainBatch(
        token_ids=TOKENS, targets=targets, weights=torch.ones(len(TOKENS)), lengths=(len(TOKENS),), normaliser=1.0
    )
    for _ in range(2):  # the first packs what the backward needs
        trainer.forward_backward(batch)
        trainer.optim_step()
    trainer.optimizer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("write", [step, initialise, lambda model: prune_heads(model, {0: [1], 1: [0, 5]})])
def test_after_a_step_a_load_and_pruning(
    write: Callable[[Decoder], object], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = load(save_tiny("gpt2", tmp_path), dtype=dtype)
    before = logits_of(model)
    write(model)
    checked(model, before)


def test_after_the_steps_of_an_adapter_its_merge_and_its_unmerge(tmp_path: Path) -> None:
    model = load(save_tiny("llama", tmp_path))
    attach(model, LoraConfig(rank=4, targets="all-linear"))
    before = logits_of(model)
    step(model)
    beside = checked(model, before)
    merge(model)
    merged = checked(model, beside)
    unmerge(model)
    assert torch.equal(checked(model, merged), beside)
