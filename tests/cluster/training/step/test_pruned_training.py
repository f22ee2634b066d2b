"""Training models whose layers have lost heads, against plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tests.cluster.engine.tiny_models as tiny
import tests.cluster.training.step.steps as steps
from tests.ranks import free_address

LAYOUTS = [steps.Layout(), steps.Layout(tp=3, recompute="full"), steps.Layout(tp=2, sequence_parallel=True)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_steps_of_a_pruned_model_equal_plain_transformers(ranks: Any, tmp_path: Path, layout: steps.Layout) -> None:
    model = tiny.tiny_model("gpt2")
    model.prune_heads({0: [0, 3, 5], 1: [2]})
    model.save_pretrained(tmp_path / "source")
    losses, norms = steps.reference(model, 5)
    results = ranks(
        layout.tp, steps.run, str(tmp_path / "source"), layout, 5, free_address(), str(tmp_path / "out"), torch.float32
    )
    assert [loss for loss, _ in results[0][0]] == pytest.approx(losses, rel=1e-4)
    assert [norm for _, norm in results[0][0]] == pytest.approx(norms, rel=2e-4)
    trained = type(model).from_pretrained(tmp_path / "out").state_dict()
    for name, wanted in model.state_dict().items():
        assert float((trained[name] - wanted).norm() / (wanted.norm() + 1e-8)) < 1e-4, name
