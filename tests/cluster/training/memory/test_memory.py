"""Counting memory without allocating it: live bytes, imagined peers, what lasts, and the order of layouts."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.training.memory.estimate import Layout, Setup, serving_memory, training_memory
from cluster.training.memory.lasting_memory import _operands, packed_bytes, packed_size, training_bytes, weight_bytes
from cluster.training.memory.layouts import Question, make_plan, nearest
from cluster.training.memory.live_tensors import LiveBytes
from cluster.training.memory.pass_memory import PassShape, pass_cost, run_pass
from cluster.training.step.flat_buffers import PIECE
from cluster.training.step.optimizer import OptimizerConfig, ShardedAdamW
from parallel.attention.forward_pass import Pass
from parallel.errors import ConfigError
from parallel.matmul.products import Operand, native_products
from parallel.ranks.group import Group
from parallel.sharding.released_weight import is_released
from parallel.vocabulary.cross_entropy import vocab_token_losses
from tp_decoders import build, initialise
from tp_decoders.model.adapted_layers import linears
from tp_decoders.model.config import DecoderConfig
from tp_decoders.model.lora_config import LoraConfig
from tp_decoders.registry import config_from_hf

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 6, "vocab_size": 130, "n_positions": 64},
    "neox": {
        "model_type": "gpt_neox", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
        "intermediate_size": 100, "vocab_size": 130, "max_position_embeddings": 64,
    },
    "japanese": {
        "model_type": "gpt_neox_japanese", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
        "vocab_size": 130, "max_position_embeddings": 64, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    },
    "mpt": {"model_type": "mpt", "d_model": 48, "n_layers": 3, "n_heads": 6, "vocab_size": 130, "max_seq_len": 64},
    "bigcode": {
        "model_type": "gpt_bigcode", "n_embd": 48, "n_layer": 3, "n_head": 6, "vocab_size": 130, "n_positions": 64,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "head_dim": 8,
        "num_key_value_heads": 2, "intermediate_size": 100, "vocab_size": 130, "max_position_embeddings": 64,
    },
}  # fmt: skip
TOKENS = 32
SETUP = Setup(tokens=TOKENS, dtype=torch.float32, device="cuda")
GiB = 2**30


@pytest.fixture(params=FAMILIES)
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    return config_from_hf(FAMILIES[request.param])


def test_live_bytes_follow_tensors_up_and_down() -> None:
    before = torch.empty(100, device="meta")
    with LiveBytes([before]) as live:
        first = before + 1
        assert live.now == 400
        second = first * 2
        view = second[:50]
        assert live.now == 800 == live.most
        del first, second
        assert live.now == 400, "a view keeps its storage"
        del view
        assert (live.now, live.most) == (0, 800)


def test_a_gradient_that_autograd_adds_up_is_added_in_place() -> None:
    x = torch.empty(1000, device="meta", requires_grad=True)
    with LiveBytes([x]) as live:
        total = (x * 2.0).sum() + (x * 3.0).sum()
        forward = live.now
        total.backward()
    assert live.most <= forward + 2 * 4000 + 16, "two gradients, and no third for their sum"


def collectives_of_a_step(group: Group, hf: dict[str, Any], recompute: str) -> tuple[Any, Any]:
    """What the real thing issues on this rank."""
    config = config_from_hf(hf)
    model = initialise(build(config, group))
    model.recompute = recompute  # type: ignore[assignment]
    assert group.comm is not None
    group.comm.counts.clear()
    group.comm.byte_counts.clear()
    ids = torch.arange(TOKENS) % config.vocab_size
    logits = model(ids, Pass.packed((TOKENS,)))
    vocab_token_losses(logits, ids, model.head.shards, group).sum().backward()
    return group.comm.counts, group.comm.byte_counts


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_imagined_ranks_send_what_real_ranks_send(
    config: DecoderConfig, size: int, recompute: str, ranks: Callable[..., list[Any]]
) -> None:
    real = ranks(size, collectives_of_a_step, dict(config.hf), recompute)
    for rank in range(size):
        shape = PassShape(
            rank=rank, tp=size, tokens=TOKENS, dtype=torch.float32, device="cpu", recompute=recompute,  # type: ignore[arg-type]
        )  # fmt: skip
        told = run_pass(config, shape).collectives
        assert (+told.counts, +told.nbytes) == (+real[rank][0], +real[rank][1])


def test_the_passes_of_a_deep_model_are_foretold_by_two_layers(config: DecoderConfig) -> None:
    deep = replace(config, n_layers=7)
    for tp in (1, 2):
        shape = PassShape(tp=tp, tokens=TOKENS, dtype=torch.float32, device="cuda")
        assert pass_cost(deep, shape).kept == run_pass(deep, shape).kept
        assert pass_cost(deep, shape).peak == pytest.approx(run_pass(deep, shape).peak, rel=0.02)


def test_recomputing_keeps_less_the_more_is_recomputed(config: DecoderConfig) -> None:
    how: tuple[Any, ...] = ("none", "selective", "full")
    kept = [
        run_pass(config, PassShape(tokens=TOKENS, dtype=torch.float32, device="cpu", recompute=r)).kept for r in how
    ]
    assert kept[0] > kept[1] > kept[2]


def test_sequence_parallelism_divides_what_is_kept_between_layers(config: DecoderConfig) -> None:
    shape = PassShape(tp=2, tokens=TOKENS, dtype=torch.float32, device="cuda")
    assert run_pass(config, replace(shape, sequence_parallel=True)).kept < run_pass(config, shape).kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dp", [1, 2])
def test_what_lasts_is_what_the_optimiser_really_allocates(config: DecoderConfig, dtype: torch.dtype, dp: int) -> None:
    told = training_bytes(build(config, Group(1, 2), dtype, "meta"), Group(0, dp), "cuda")
    real = build(config, Group(1, 2), dtype, "cpu")
    optimizer = ShardedAdamW(real, Group(1, 2), Group(0, dp), OptimizerConfig())
    optimizer.prepare_state(0)
    moments = sum(moment.nbytes for moments in optimizer._moments.values() for moment in moments.values())
    masters = sum(flat.master.nbytes for flat in optimizer.flats)
    own = sum(p.nbytes for p in real.parameters() if p.dtype is torch.float32)
    assert told.gradients == sum(flat.grad.nbytes for flat in optimizer.flats)
    assert told.optimizer == masters - own + moments
    assert told.weights >= sum(p.nbytes for p in real.parameters())


def test_an_update_over_dp_takes_a_piece_of_a_buffer_whatever_its_size() -> None:
    large = config_from_hf({**FAMILIES["neox"], "hidden_size": 1200, "intermediate_size": 4800})
    deep = [replace(large, n_layers=count) for count in (4, 8)]
    told = [training_bytes(build(each, dtype=torch.bfloat16, device="meta"), Group(0, 2), "cuda") for each in deep]
    assert told[1].gradients > 1.5 * told[0].gradients
    assert told[0].update == told[1].update == 6 * 4 * PIECE, "gathered, padded, and this rank's own"


@pytest.mark.skipif(not native_products(), reason="packed weights belong to the native kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_copies_are_those_that_a_step_makes(config: DecoderConfig, dtype: torch.dtype) -> None:
    model = initialise(build(config, dtype=dtype))
    ids = torch.arange(TOKENS) % config.vocab_size
    logits = model(ids, Pass.packed((TOKENS,)))
    vocab_token_losses(logits, ids, model.head.shards, Group.single()).sum().backward()
    owned = {id(parameter) for parameter in model.parameters()}
    made = [found for found in gc.get_objects() if type(found) is Operand and id(found.parameter) in owned]
    sizes = sorted(operand.packed().nbytes for operand in made)
    forward, backward = _operands(build(config, dtype=dtype, device="meta"))
    assert sorted(packed_size(*operand) for operand in forward + backward) == sizes
    assert packed_bytes(model, training=True) >= sum(sizes)


@pytest.mark.skipif(not native_products(), reason="packed weights belong to the native kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_that_serves_holds_what_it_was_told(config: DecoderConfig, dtype: torch.dtype) -> None:
    model = initialise(build(config, dtype=dtype))
    plain = sum(parameter.nbytes for parameter in model.parameters())
    for layer in linears(model).values():
        layer.release()
    kept = sum(p.nbytes for p in model.parameters() if not is_released(p))
    memory = serving_memory(config, 1, replace(SETUP, dtype=dtype, device="cpu"), cached_tokens=16)
    assert kept <= memory.weights <= kept + weight_bytes(model) - plain
    assert memory.packed == packed_bytes(build(config, dtype=dtype, device="meta"), training=False)
    on_gpu = serving_memory(config, 1, replace(SETUP, dtype=dtype), cached_tokens=16)
    assert on_gpu.weights >= plain and not on_gpu.packed


@pytest.mark.parametrize("tp", [1, 2])
def test_serving_holds_a_checkpoint_of_some_size_once(tp: int) -> None:
    wide = {"num_attention_heads": 16, "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 50304}
    config = config_from_hf({**FAMILIES["neox"], **wide})
    setup = Setup(tokens=TOKENS, dtype=torch.bfloat16, device="cpu")
    checkpoint = sum(p.nbytes for p in build(config, dtype=torch.bfloat16, device="meta").parameters())
    memories = [serving_memory(config, tp, setup, cached_tokens=16, rank=rank) for rank in range(tp)]
    assert checkpoint <= sum(memory.weights + memory.packed for memory in memories) <= 1.1 * checkpoint


def test_lora_trains_little_and_keeps_the_weights(config: DecoderConfig) -> None:
    lora = replace(SETUP, lora=LoraConfig(rank=2, targets="all-linear"))
    full, small = (training_memory(config, Layout(tp=2, dp=1), setup) for setup in (SETUP, lora))
    assert small.weights > full.weights
    assert small.gradients + small.optimizer < 0.4 * (full.gradients + full.optimizer)
    assert small.activations > 0


def test_kinds_add_up_to_the_total(config: DecoderConfig) -> None:
    memory = training_memory(config, Layout(), SETUP)
    assert (
        memory.total - memory.runtime
        == memory.total - memory.runtime
        == sum(
            (memory.weights, memory.gradients, memory.optimizer, memory.packed, memory.activations, memory.workspace)
        )
    )


def test_the_cache_of_a_served_model_is_its_layout_times_its_tokens(config: DecoderConfig) -> None:
    memory = serving_memory(config, 2, SETUP, cached_tokens=160)
    heads = max(1, config.n_kv_heads // 2)
    assert memory.kv_cache == 160 * 2 * config.n_layers * heads * config.head_dim * 4


def question(**how: Any) -> Question:
    usual: dict[str, Any] = {
        "config": config_from_hf(FAMILIES["neox"]), "ranks": 4, "memory": 80 * GiB, "per_node": 2, "setup": SETUP,
        "sequence": TOKENS, "batch_size": 8,
    }  # fmt: skip
    return Question(**{**usual, **how})


def test_all_layouts_are_weighed_and_the_best_within_a_node_comes_first() -> None:
    plan = make_plan(question())
    assert {(c.layout.tp, c.layout.dp) for c in plan.fitting} == {(1, 4), (2, 2), (4, 1)}
    assert len(plan.fitting) == 3 + 6 + 6 and not plan.others
    order = [c.layout.tp for c in plan.fitting if c.layout.recompute == "none" and not c.layout.sequence_parallel]
    assert order == [1, 2, 4]
    across = next(c for c in plan.fitting if c.layout.tp == 4)
    assert "tp=4 crosses nodes: every layer's sums do" in across.reasons
    assert "6 heads do not divide by 4: uneven work" in across.reasons


def test_a_group_that_does_not_divide_a_node_lies_across_two() -> None:
    two = next(c for c in make_plan(question(per_node=3)).fitting if c.layout.tp == 2)
    assert "tp=2 crosses nodes: every layer's sums do" in two.reasons


def test_of_two_alike_the_one_that_computes_nothing_twice_comes_first() -> None:
    fitting = make_plan(question(ranks=1)).fitting
    assert [c.layout.recompute for c in fitting] == ["none", "selective", "full"]
    assert fitting[0].seconds < fitting[1].seconds < fitting[2].seconds


def test_where_nothing_fits_the_nearest_is_found_with_more_ranks() -> None:
    config = config_from_hf({**FAMILIES["neox"], "hidden_size": 1536, "intermediate_size": 6144})
    small = question(config=config, ranks=1, memory=2 * GiB + 600 * 2**20)
    plan = make_plan(small)
    assert not plan.fitting and plan.others
    found = nearest(small)
    assert found is not None and found[0].ranks > 1 and found[1].memory.total <= small.memory
    assert nearest(question(config=config, ranks=1, memory=2**20)) is None


@pytest.mark.parametrize(
    ("how", "message"),
    [({"sequence": 65}, "sequences of 65 tokens for a model with 64 positions"), ({"ranks": 0}, "ranks is 0"),
     ({"ranks": 16, "batch_size": 1}, "16 ranks: no tp x dp of them")],
)  # fmt: skip
def test_what_cannot_be_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(question(**how))
