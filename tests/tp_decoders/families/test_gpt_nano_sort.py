"""A real trained model (3 heads, 3 tokens): its author's own activations reproduced, every input sorted, tp 1 to 3."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.attention.attend import AttentionSpec, Causal
from parallel.attention.forward_pass import Pass
from parallel.layers.dropout import HeadMasks
from parallel.ranks.group import Group
from tp_decoders import load

FOLDER = Path(__file__).parents[2] / "data/gpt-nano-sort"
SIZES = (1, 2, 3)
TOLERANCE = 2e-5  # of the largest value of a stage


class Recording:
    """A pass's `attend` that keeps what the first layer's attention takes and gives."""

    def __init__(self, lengths: list[int]) -> None:
        self.attend = Causal(lengths)
        self.seen: dict[str, Tensor] = {}

    def __call__(
        self, spec: AttentionSpec, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, *, masks: HeadMasks | None = None
    ) -> Tensor:
        out_TNH = self.attend(spec, q_TNH, k_TKH, v_TKH, masks=masks)
        if spec.layer == 0:
            self.seen = {"q": q_TNH.clone(), "k": k_TKH.clone(), "v": v_TKH.clone(), "y": out_TNH.clone()}
        return out_TNH


def activations(group: Group, ids: list[list[int]]) -> dict[str, Tensor]:
    """This rank's view of every stage of one forward, by the author's names."""
    model: Any = load(FOLDER, group=group)
    seen: dict[str, Tensor] = {}
    block = model.blocks[0]
    stages = {"tok_emb": model.embed, "ln1": block.ln1, "yProj": block.out, "ln2": block.ln2, "gelu": block.up}
    stages |= {"mlp": block.down, "ln_f": model.norm} | {f"block{i}": model.blocks[i] for i in range(3)}
    for name, module in stages.items():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.__setitem__(name, output))
    now = Pass.packed([len(row) for row in ids])
    attend = Recording([len(row) for row in ids])
    tokens = torch.tensor(ids).flatten()
    with torch.no_grad():
        logits = model(tokens, replace(now, attend=attend))
    return {**seen, **attend.seen, "lm_head": model.head.gather(logits)}


def author(name: str, stages: dict[str, Any]) -> Tensor:
    """A stage as the author recorded it, over flat tokens."""
    table = stages[name]
    values = torch.frombuffer(bytearray(base64.b64decode(table["data"])), dtype=torch.float32).view(table["shape"])
    return values.transpose(1, 2).flatten(0, 1) if name in ("q", "k", "v") else values.flatten(0, 1)


@pytest.mark.parametrize("size", SIZES)
def test_the_authors_activations_are_reproduced(size: int, ranks: Callable[..., list[Any]]) -> None:
    stages = json.loads((FOLDER / "gpt-nano-sort-t0-partials.json").read_text())
    ids = author("idx", stages).view(3, 11).long().tolist()
    by_rank = ranks(size, activations, ids)
    for name in ("tok_emb", "ln1", "yProj", "ln2", "mlp", "block0", "block1", "block2", "ln_f", "lm_head"):
        for seen in by_rank:
            assert_close(name, seen[name], author(name, stages))
    for name in ("q", "k", "v", "y", "gelu"):  # each rank has its own heads or columns
        whole = torch.cat([seen[name] for seen in by_rank], 1).flatten(1)
        assert_close(name, whole, author(name, stages).flatten(1))


def assert_close(name: str, ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape, name
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max(), name


def sorted_by_model(group: Group, inputs: list[tuple[int, ...]]) -> Tensor:
    """Six tokens generated greedily for every input."""
    model = load(FOLDER, group=group)
    ids = torch.tensor(inputs)
    for _ in range(6):
        count, length = ids.shape
        rows = torch.arange(1, count + 1) * length - 1
        with torch.no_grad():
            logits = model(ids.flatten(), Pass.packed([length] * count), rows=rows)
        ids = torch.cat([ids, model.head.argmax(logits).ids[:, None]], 1)
    return ids[:, 6:]


@pytest.mark.parametrize("size", SIZES)
def test_all_729_inputs_are_sorted(size: int, ranks: Callable[..., list[Any]]) -> None:
    inputs = list(product(range(3), repeat=6))
    for outputs in ranks(size, sorted_by_model, inputs):
        assert outputs.tolist() == [sorted(row) for row in inputs]
