"""GPT-NeoX-20B over 16 ranks, tp 8 x dp 2, without the GPUs: every shard's shape and bytes, and what a step sends.

The ranks are groups that exist as numbers, the tensors are shapes, the model's code is the real one. Numbers are
compared with closed forms written out here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from cluster.training.memory.estimate import Layout, Setup, lasting, training_memory
from cluster.training.memory.pass_memory import PassShape, pass_cost, run_pass
from launch.presets import find, read
from parallel.ranks.group import Group
from parallel.sharding.rules import full_shape_of
from tp_decoders import build
from tp_decoders.model.config import DecoderConfig
from tp_decoders.registry import config_from_hf

TP, DP = 8, 2
LAYERS, D, HEADS, F, V, T = 44, 6144, 64, 24576, 50432, 2048
PARAMETERS = 2 * V * D + LAYERS * (12 * D * D + 13 * D) + 2 * D
"""Embedding and head; q, k, v, output and the MLP's two matrices with biases, two norms; the last norm."""


@pytest.fixture(scope="module")
def config() -> DecoderConfig:
    return config_from_hf(dict(read(find("gpt-neox-20b", "models")).values))


def vocabulary(rank: int) -> int:
    """Rows of a rank: 788 runs of 64 rows in 8 virtual shards, the first four one run longer."""
    runs = V // 64
    return 64 * (runs // TP + (1 if rank < runs % TP else 0))


def shapes(rank: int) -> dict[str, tuple[int, ...]]:
    """Of every parameter of one rank."""
    block: dict[str, tuple[int, ...]] = {
        "ln1.weight": (D,), "ln1.bias": (D,), "ln2.weight": (D,), "ln2.bias": (D,),
        "qkv.weight": (3 * D // TP, D), "qkv.bias": (3 * D // TP,),
        "out.weight": (D, D // TP), "out.bias": (D,),
        "up.weight": (F // TP, D), "up.bias": (F // TP,),
        "down.weight": (D, F // TP), "down.bias": (D,),
    }  # fmt: skip
    whole: dict[str, tuple[int, ...]] = {
        "embed.weight": (vocabulary(rank), D),
        "head.linear.weight": (vocabulary(rank), D),
    }
    whole |= {"norm.weight": (D,), "norm.bias": (D,)}
    return whole | {f"blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}


def test_every_rank_has_the_shards_of_the_formula_and_together_they_are_the_model(config: DecoderConfig) -> None:
    total = replicated = 0
    for rank in range(TP * DP):
        model = build(config, Group(rank % TP, TP), torch.bfloat16, "meta")
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes(rank % TP)
        if rank < TP:
            total += sum(p.numel() for p in model.parameters())
            replicated = sum(p.numel() for p in model.parameters() if tuple(p.shape) == full_shape_of(p))
    assert sum(vocabulary(rank) for rank in range(TP)) == V
    assert total - (TP - 1) * replicated == PARAMETERS == 20_554_567_680


def test_bytes_of_a_rank_are_weights_masters_gradients_and_half_of_the_moments(config: DecoderConfig) -> None:
    setup = Setup(tokens=T, dtype=torch.bfloat16, device="cuda")
    for rank in (0, TP - 1):
        held = lasting(config, TP, DP, setup, rank)
        count = sum(torch.Size(shape).numel() for shape in shapes(rank).values())
        rotary = 2 * T * (D // HEADS // 4 // 2) * 4
        assert held.weights == 2 * count + rotary
        assert held.gradients == pytest.approx(4 * count, rel=1e-6)  # padded to whole vectors
        assert held.optimizer == pytest.approx(4 * count + 8 * count / DP, rel=1e-6)


def in_all_layers(config: DecoderConfig, layers: int, **how: object) -> tuple[Counter[str], Counter[str]]:
    shape = PassShape(tp=TP, tokens=T, dtype=torch.bfloat16, device="cuda", **how)  # type: ignore[arg-type]
    moved = run_pass(replace(config, n_layers=layers), shape).collectives
    return moved.counts, moved.nbytes


def closed_form(reductions: int, layers: int) -> tuple[Counter[str], Counter[str]]:
    """A rank's share of a step's collectives, from the layers' formulas.

    tree_sum   forward: `reductions` per layer and the sum of exponentials; backward: one for the gradient of the input
               of every column-parallel layer (qkv, up) and of the head. With 8 leaves on 8 ranks a rank gives one root.
    sum        the embedding, in bfloat16; the targets' logits
    maximum    of the logits
    """
    row = T * D * 4
    counts = Counter(tree_sum=(reductions + 2) * layers + 2, sum=2, all_reduce_max=1)
    nbytes = Counter(
        tree_sum=((reductions + 2) * layers + 1) * row + T * 4, sum=T * D * 2 + T * 4, all_reduce_max=T * 4
    )
    return counts, nbytes


@pytest.mark.parametrize(("parallel_residual", "reductions"), [(True, 1), (False, 2)])
def test_collectives_of_a_forward_and_backward_are_those_of_the_closed_form(
    config: DecoderConfig, parallel_residual: bool, reductions: int
) -> None:
    chosen = replace(config, options=replace(config.options, parallel_residual=parallel_residual))
    assert in_all_layers(chosen, LAYERS) == closed_form(reductions, LAYERS)


def test_recomputation_sends_the_forwards_sums_again_and_sequence_parallelism_gathers_tokens(
    config: DecoderConfig,
) -> None:
    counts, nbytes = in_all_layers(config, 4, recompute="full")
    plain, sent = closed_form(1, 4)
    assert counts == plain + Counter(tree_sum=4)
    assert nbytes == sent + Counter(tree_sum=4 * T * D * 4)
    counts, _ = in_all_layers(config, 4, sequence_parallel=True)
    gathers = 2 * 4 + 3 * 4 + 2  # into qkv and up; again in the backward, and out of the sums; at both ends
    assert counts["all_gather"] == gathers
    assert counts["tree_sum"] == plain["tree_sum"] + 2 * 4  # the gains of two norms, summed over tokens


def test_what_two_layers_say_of_forty_four_is_what_forty_four_say(config: DecoderConfig) -> None:
    shape = PassShape(tp=TP, tokens=T, dtype=torch.bfloat16, device="cuda")
    assert pass_cost(config, shape) == run_pass(config, shape)


def test_the_layout_of_the_preset_fits_with_room(config: DecoderConfig) -> None:
    values = read(find("gpt-neox-20b", "training")).values
    assert (values["parallel"]["tp"], values["parallel"]["dp"]) == (TP, DP)
    setup = Setup(tokens=T, dtype=torch.bfloat16, device="cuda")
    assert training_memory(config, Layout(tp=TP, dp=DP), setup).total < 72 * 2**30
