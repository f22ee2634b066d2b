"""The arithmetic of a step against a count by hand and torch's own counter."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.training.step import flops
from cluster.training.step.flops import ModelFlops, num_parameters, product_ceiling, product_name
from parallel.ranks.group import Group
from tests.cluster.engine.tiny_models import CONFIGS, VOCAB, tiny_model
from tp_decoders import build
from tp_decoders.registry import config_from_hf


def hf_config(family: str, **more: Any) -> dict[str, Any]:
    shape: dict[str, Any] = tiny_model(family, **more).config.to_dict()
    return shape


@pytest.mark.parametrize("family", list(CONFIGS))
def test_products_of_a_step_are_those_torch_counts_in_transformers(family: str) -> None:
    theirs = tiny_model(family)
    length = 32
    with FlopCounterMode(display=False) as counter:
        theirs(torch.randint(VOCAB, (1, length))).logits.sum().backward()
    mine = ModelFlops.of(build(config_from_hf(theirs.config.to_dict()), dtype=torch.float32))
    whole_square = mine((length,)) + mine.per_square * length**2  # eager attention computes both halves
    first_input = counter.get_total_flops() / whole_square
    assert 0.97 < first_input < 1.03, "more than an input gradient that nobody needs differs"


@pytest.mark.parametrize("size", [1, 3])
def test_any_rank_counts_the_whole_model(size: int) -> None:
    shape = hf_config("gpt_neox")
    counts = set()
    for rank in range(size):
        model = build(config_from_hf(shape), Group(rank, size), dtype=torch.float32, device="meta")
        counts.add((ModelFlops.of(model), num_parameters(model)))
    theirs = sum(parameter.numel() for parameter in tiny_model("gpt_neox").parameters())
    assert len(counts) == 1 and counts.pop()[1] == theirs


def test_a_tied_head_counts_and_what_is_only_looked_up_does_not() -> None:
    tied = ModelFlops.of(build(config_from_hf(hf_config("gpt2", tie_word_embeddings=True)), dtype=torch.float32))
    untied = ModelFlops.of(build(config_from_hf(hf_config("gpt2", tie_word_embeddings=False)), dtype=torch.float32))
    assert tied == untied
    assert tied.per_token == 6 * (VOCAB * 48 + 2 * 12 * 48 * 48)


def test_weights_that_are_not_trained_need_no_gradient_of_their_own() -> None:
    model = build(config_from_hf(hf_config("gpt2")), dtype=torch.float32)
    whole = ModelFlops.of(model).per_token
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert ModelFlops.of(model).per_token * 3 == whole * 2


def test_the_ceiling_is_a_rate_of_this_machine_and_says_what_it_is() -> None:
    device = torch.device("cpu")
    assert 1e8 < product_ceiling(device, torch.float32, seconds=0.05) < 1e14
    name = product_name(device, torch.bfloat16)
    assert name.startswith("a measured product of two ") and name.endswith(" bfloat16 matrices")


def test_a_slow_product_of_torch_is_not_taken_for_the_machines_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    device, size = torch.device("cpu"), flops.product_size(torch.device("cpu"))
    monkeypatch.setattr(flops.torch, "matmul", lambda *_, **__: time.sleep(1.0))
    assert flops.product_ceiling(device, torch.float32, seconds=0.1) > 2 * (2 * size**3 / 1.0)
