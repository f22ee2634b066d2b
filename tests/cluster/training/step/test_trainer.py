"""Training against transformers and torch's AdamW, and against itself: one set of bits for every tensor-parallel
layout.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.cluster.engine.tiny_models as tiny
import tests.cluster.training.step.steps as steps
from tests.ranks import free_address

FAMILIES = sorted(tiny.CONFIGS)
PLAIN = steps.Layout()
DIVIDED = [
    steps.Layout(tp=2, sequence_parallel=True, recompute="selective"),
    steps.Layout(tp=3, recompute="full"),
    steps.Layout(dp=2, micro_batch_tokens=10),
    steps.Layout(tp=2, dp=2, sequence_parallel=True, recompute="full"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {family: tiny.save_tiny(family, root / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_equal_plain_transformers_and_torch(
    ranks: Any, checkpoints: dict[str, Path], tmp_path: Path, family: str
) -> None:
    model = tiny.tiny_model(family)
    losses, norms = steps.reference(model, 20)
    for layout in (PLAIN, *DIVIDED):
        out = tmp_path / layout.name
        size = layout.tp * layout.dp
        results = ranks(size, steps.run, str(checkpoints[family]), layout, 20, free_address(), str(out), torch.float32)
        per_dp = [results[d * layout.tp][0] for d in range(layout.dp)]
        ours = [sum(history[i][0] for history in per_dp) for i in range(20)]
        assert ours == pytest.approx(losses, rel=1e-4), layout.name
        assert [norm for _, norm in results[0][0]] == pytest.approx(norms, rel=2e-4), layout.name
        trained = type(model).from_pretrained(out).state_dict()
        for name, wanted in model.state_dict().items():
            error = float((trained[name] - wanted).norm() / (wanted.norm() + 1e-8))
            assert error < 1e-4, f"{layout.name}: {name} is off by {error:.1e}"


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints whose configs say dropout everywhere the family has it."""
    root = tmp_path_factory.mktemp("dropping")
    return {family: tiny.save_tiny(family, root / family, **tiny.DROPOUTS[family]) for family in FAMILIES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_steps_with_dropout_give_the_same_weights_bit_for_bit_at_every_layout(
    ranks: Any, dropping: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    layouts = [
        steps.Layout(dropout=True),
        steps.Layout(dropout=True, tp=2, sequence_parallel=True, recompute="selective"),
        steps.Layout(dropout=True, tp=3, recompute="full"),
        steps.Layout(dropout=True, tp=4, sequence_parallel=True, recompute="full"),
    ]
    num_steps = 50 if dtype is torch.float32 else 10
    digests = {}
    for layout in layouts:
        results = ranks(layout.tp, steps.run, str(dropping[family]), layout, num_steps, "", None, dtype)
        digests[layout.name] = (results[0][1], results[0][0][-1])
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_do_not_depend_on_micro_batches_or_replicas(ranks: Any, dropping: dict[str, Path], family: str) -> None:
    def losses(layout: Any) -> list[float]:
        size, address = layout.tp * layout.dp, free_address()
        results = ranks(size, steps.run, str(dropping[family]), layout, 3, address, None, torch.float32)
        return [sum(results[d * layout.tp][0][i][0] for d in range(layout.dp)) for i in range(3)]

    whole = losses(steps.Layout(dropout=True))
    assert losses(steps.Layout(dropout=True, micro_batch_tokens=10)) == pytest.approx(whole, rel=1e-5)
    assert losses(steps.Layout(dropout=True, dp=2)) == pytest.approx(whole, rel=1e-5)
    assert losses(steps.Layout()) != pytest.approx(whole, rel=1e-3), "the masks must matter"


def test_another_learning_rate_gives_other_weights(ranks: Any, checkpoints: dict[str, Path]) -> None:
    run = [ranks(1, steps.run, str(checkpoints["gpt2"]), PLAIN, n, "", None, torch.float32)[0][1] for n in (1, 2)]
    assert run[0] != run[1], "then equal digests would mean nothing"
    assert replace(PLAIN, tp=2) != PLAIN
