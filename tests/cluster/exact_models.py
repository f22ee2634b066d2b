"""Tiny models made of integers, and what is asked of them: no generator, library or machine shows in them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import tp_decoders
from cluster.engine.engine import generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, ResponseOptions, SamplingParams, StoppingCriteria
from cluster.training.step.optimizer import OptimizerConfig
from cluster.training.step.train_batch import TrainBatch
from cluster.training.step.trainer import Trainer, TrainerConfig
from parallel.attention.forward_pass import Pass
from parallel.layers.dropout import mix_keys
from parallel.ranks.group import Group
from parallel.ranks.mesh import Groups
from tests.cluster.engine.tiny_models import VOCAB, save_tiny
from tp_decoders.model.decoder import Decoder

LENGTHS = (9, 4, 21, 6)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=1.0)


def numbers(count: int, salt: str) -> Tensor:
    """[count] float32 in [-1, 1): multiples of 2^-23, mixed from their places."""
    keys = mix_keys(torch.arange(count) + (zlib.crc32(salt.encode()) << 20))
    return ((keys >> 40) & 0xFFFFFF).float() * 2.0**-23 - 1.0


def ids(count: int, salt: str) -> Tensor:
    """[count] tokens."""
    return (mix_keys(torch.arange(count) + (zlib.crc32(salt.encode()) << 20)) >> 20) % VOCAB


def exact_model(family: str, folder: Path, dtype: torch.dtype) -> Decoder:
    """The family's tiny model of one process."""
    model = tp_decoders.load(save_tiny(family, folder), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = numbers(parameter.numel(), name).view(parameter.shape)
            if parameter.dim() == 1:
                drawn = drawn * 0.125 + (1.0 if name.endswith("weight") else 0.0)
            else:
                drawn = drawn * 2.0 ** round(math.log2(4.0 * parameter.shape[-1] ** -0.5))
            parameter.copy_(drawn)
    return model


def logits(model: Decoder) -> Tensor:
    """[T, V] of packed sequences."""
    with torch.no_grad():
        return model(ids(sum(LENGTHS), "tokens"), Pass.packed(LENGTHS))


def log_probs(model: Decoder) -> Tensor:
    """[T] of drawn targets under `logits`."""
    with torch.no_grad():
        return model.head.log_probs(logits(model), ids(sum(LENGTHS), "targets"))


def greedy(model: Decoder, new_tokens: int, temperature: float = 0.0) -> list[list[int]]:
    """What the engine answers to two prompts."""
    config = EngineConfig(kv_blocks=64, max_sequences=4, max_step_tokens=64)
    engine = build_engine(build_runner(model, config, 0), config)
    sampling = SamplingParams(temperature=temperature, seed=7, top_p=0.9 if temperature else 1.0)
    asked = [
        Request(
            request_id=f"{length}", token_ids=tuple(ids(length, f"prompt {length}").tolist()), sampling=sampling,
            stopping=StoppingCriteria(max_new_tokens=new_tokens, ignore_eos=True),
            response=ResponseOptions(logprobs=2, prompt_logprobs=1),
        )
        for length in (5, 18)
    ]  # fmt: skip
    return [result.token_ids for results in generate(engine, asked) for result in results]


def training(model: Decoder, steps: int) -> Iterator[tuple[float, float]]:
    """(loss, gradient norm) of each step; the model is trained in place."""
    group = Group.single()
    trainer = Trainer(model, Groups(group, group), TrainerConfig(optimizer=OPTIMIZER))
    for step in range(steps):
        result = trainer.forward_backward(batch(step))
        yield result.loss, trainer.optim_step().grad_norm


def batch(step: int) -> TrainBatch:
    tokens = [ids(length, f"step {step} of {length}") for length in LENGTHS]
    targets = torch.cat([torch.cat([own[1:], torch.tensor([-100])]) for own in tokens])
    return TrainBatch(
        token_ids=torch.cat(tokens), targets=targets, weights=torch.ones(len(targets)), lengths=LENGTHS,
        normaliser=float(sum(LENGTHS) - len(LENGTHS)),
    )  # fmt: skip
