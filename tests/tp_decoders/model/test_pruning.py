"""Pruned heads of GPT-2 against transformers: read, taken out of a loaded model, saved, loaded again and served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from cluster.engine.engine import generate
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import Request, SamplingParams, StoppingCriteria
from cluster.engine.run.command_stream import Commands
from cluster.engine.run.executors import follow
from parallel.attention.heads import HeadLayout
from parallel.errors import ConfigError
from parallel.ranks.group import Group
from tests.tp_decoders.families.parity import GPT2, TOLERANCE, hf
from tests.tp_decoders.padded.padded_cases import (
    MODELS,
    SIZES,
    WATCHED,
    Scenario,
    batch_ids,
    cached,
    deviation,
    padded,
    write_scenario,
)
from tp_decoders import load, save
from tp_decoders.adapters.lora import attach
from tp_decoders.model.lora_config import LoraConfig
from tp_decoders.model.pruning import prune_heads
from tp_decoders.padded.padded_model import PaddedModel

GONE = {0: [1, 4], 1: [0, 2, 3]}
MORE = {0: [4, 0], 2: [5]}
THEN = {"0": [0, 1, 4], "1": [0, 2, 3], "2": [5]}
MASK = torch.tensor([[0.5, 9.0, 1.0, 0.0, 9.0, 2.0], [9.0, 0.3, 9.0, 9.0, 1.0, 0.0], [1.0, 1.0, 0.5, 0.0, 1.0, 1.0]])
HEADS = {"n_head": 6, "n_layer": 3}


def pruned(gone: dict[int, list[int]] | None = None, **options: Any) -> Any:
    torch.manual_seed(4)
    model = hf("GPT2", GPT2, **{**HEADS, **options})()
    model.prune_heads(GONE if gone is None else gone)
    return model


def with_head_mask(gone: dict[int, list[int]]) -> Scenario:
    """By the numbers of the unpruned heads; what stands for those that are gone does not matter."""
    scenario = padded("gpt2", "left", **WATCHED)
    scenario.ours[0]["head_mask"] = MASK
    scenario.head_masks = [
        torch.stack([MASK[layer][i] for i in range(6) if i not in gone.get(layer, [])]) for layer in range(3)
    ]
    return scenario


CALLS: dict[str, Callable[[], Scenario]] = {
    "attentions, hidden states and cache": lambda: padded("gpt2", "left", **WATCHED),
    "past": lambda: cached("gpt2", "right", (2, 4)),
    "head_mask": lambda: with_head_mask(GONE),
}


@pytest.mark.parametrize(
    ("crossing", "feature"),
    [(False, feature) for feature in CALLS] + [(True, "past"), (True, "attentions, hidden states and cache")],
    ids=lambda value: value if isinstance(value, str) else "gpt2 with cross-attention" if value else "gpt2",
)
def test_a_checkpoint_with_pruned_heads_equals_transformers(
    crossing: bool, feature: str, ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    scenario = CALLS[feature]()
    for call in (*scenario.ours, *scenario.theirs) if crossing else ():
        call["encoder_hidden_states"] = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(6))
    write_scenario(pruned(add_cross_attention=crossing), "gpt2", scenario, tmp_path)
    for size in (*SIZES, 4):
        for errors in ranks(size, deviation, str(tmp_path)):
            assert not {name: e for name, e in errors.items() if not e <= TOLERANCE}, size


def pruned_and_saved(group: Group, source: str, target: str, steps: list[dict[int, list[int]]]) -> dict[str, Any]:
    """Heads taken out of a loaded model, step by step; it is used, saved, and compared with what is loaded again."""
    model = load(source, group=group)
    dict(model.named_parameters())["blocks.0.qkv.weight"].requires_grad_(False)
    for step in steps:
        prune_heads(model, step)
    logits = PaddedModel(model)(batch_ids()).logits
    logits.sum().backward()
    save(model, target)
    again = load(target, group=group)
    same = all(
        torch.equal(a, b) and name == other
        for (name, a), (other, b) in zip(model.named_parameters(), again.named_parameters(), strict=True)
    )
    heads = [model.heads(layer) for layer in range(3)]
    return {
        "logits": logits.detach(),
        "again": torch.equal(PaddedModel(again)(batch_ids()).logits, logits),
        "same": same and model.config == again.config,
        "frozen": [name for name, p in model.named_parameters() if p.grad is None],
        "ids": [list(layout.local_ids) for layout in heads],
        "sizes": [layout.shards.sizes for layout in heads],
    }


def test_heads_taken_out_of_a_loaded_model_are_gone_in_transformers_too(
    ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    model = pruned({})
    model.save_pretrained(tmp_path / "source")
    model.prune_heads(GONE)
    model.prune_heads(MORE)
    expected, one = model(batch_ids()).logits.detach(), None
    for size in (*SIZES, 4):
        target = tmp_path / f"target{size}"
        found = ranks(size, pruned_and_saved, str(tmp_path / "source"), str(target), [GONE, MORE])
        for result in found:
            assert (result["logits"] - expected).abs().max() <= TOLERANCE * expected.abs().max(), size
            assert result["again"] and result["same"] and result["frozen"] == ["blocks.0.qkv.weight"], size
        one = found[0]["logits"] if one is None else one
        assert torch.equal(found[0]["logits"], one), "the same bits at every size"
        check_balance(found, size)
        check_saved(model, target, expected)


def check_balance(found: list[dict[str, Any]], size: int) -> None:
    """The heads that are left are divided as those of a model that never had others."""
    for layer in range(3):
        left = [i for i in range(6) if i not in THEN.get(str(layer), [])]
        assert [head for result in found for head in result["ids"][layer]] == left
        fresh = HeadLayout.of(Group(0, size), len(left), len(left), 4).shards.sizes
        assert found[0]["sizes"][layer] == fresh and max(fresh) - min(fresh) <= 2


def check_saved(model: Any, target: Path, expected: Tensor) -> None:
    assert json.loads((target / "config.json").read_text())["pruned_heads"] == THEN
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(target, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.pruned_heads == {int(layer): heads for layer, heads in THEN.items()}
    tensors = load_file(target / "model.safetensors")
    assert all(torch.equal(tensors[name], p) for name, p in model.named_parameters())
    assert (loaded.eval()(batch_ids()).logits - expected).abs().max() <= 1e-5


def served(group: Group, folder: str, prompts: list[list[int]]) -> list[list[int]] | None:
    """Greedy continuations through the engine and its paged cache; on rank 0."""
    config = EngineConfig(kv_blocks=16, max_sequences=4, max_step_tokens=16)
    runner = build_runner(load(folder, group=group), config, 0)
    if group.size > 1 and group.rank:
        follow(runner, Commands(group.talk))
        return None
    commands = Commands(group.talk) if group.size > 1 else None
    engine = build_engine(runner, config, commands=commands)
    requests = [
        Request(
            request_id=str(i),
            token_ids=tuple(prompt),
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingCriteria(max_new_tokens=12),
        )
        for i, prompt in enumerate(prompts)
    ]
    results = generate(engine, requests)
    engine.close()
    return [list(result[0].token_ids) for result in results]


def test_layers_of_different_width_are_served_from_one_cache(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    model = pruned()
    model.save_pretrained(tmp_path)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6], [5]]
    expected = [
        model.generate(
            torch.tensor([p]), attention_mask=torch.ones(1, len(p)), do_sample=False, max_new_tokens=12,
            eos_token_id=31, pad_token_id=0,
        )[0, len(p):].tolist()
        for p in prompts
    ]  # fmt: skip
    for size in SIZES:
        assert ranks(size, served, str(tmp_path), prompts)[0] == expected, size


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    pruned({}).save_pretrained(tmp_path / "gpt2")
    model = load(tmp_path / "gpt2")
    for heads, said in (
        ({3: [0]}, "layers are 0 to 2"),
        ({-1: [0]}, "layers are 0 to 2"),
        ({0: [6]}, "heads are numbered 0 to 5"),
        ({0: range(6)}, "one must be left"),
    ):
        with pytest.raises(ConfigError, match=said):
            prune_heads(model, heads)
    attach(model, LoraConfig(rank=2))
    with pytest.raises(ConfigError, match="adapter"):
        prune_heads(model, {0: [1]})
    MODELS["mpt"]().save_pretrained(tmp_path / "mpt")
    with pytest.raises(ConfigError, match="GPT-2's can"):
        prune_heads(load(tmp_path / "mpt"), {0: [1]})
