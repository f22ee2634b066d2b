"""A rank that serves a model with an adapter merged in: its weights are what PEFT would merge, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from cluster.actors.group.placement import Place
from cluster.actors.group.worker import Phases
from cluster.actors.programs.serve_rank import ServeRank
from cluster.actors.programs.serve_spec import ParallelConfig, ServeSpec
from cluster.engine.engine_config import EngineConfig
from launch.main import main
from parallel.attention.forward_pass import Pass
from parallel.ranks.group import Group
from tests.ranks import free_address

BASE = Path(__file__).resolve().parents[3] / "data" / "gpt-nano-sort"
TOKENS = torch.tensor([2, 1, 0, 1, 2, 0])


def _served(group: Group, spec: ServeSpec, address: str) -> tuple[Tensor, list[str]]:
    place = Place(
        rank=group.rank, world=group.size, node="127.0.0.1", local_rank=group.rank, local_size=64, address=address
    )
    program = ServeRank(spec, place, Phases())
    try:
        program.start()
        assert program._runner is not None
        model = program._runner.model
        with torch.no_grad():
            logits = model.head.gather(model(TOKENS, Pass.packed([len(TOKENS)])))
        return logits, [name for name, _ in model.named_parameters() if "adapter" in name]
    finally:
        program.stop()
        program.close()


def test_the_weights_that_serve_hold_the_adapter(ranks: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE).eval()
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=True)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = model(TOKENS[None]).logits[0]
        with model.disable_adapter():
            assert float((model(TOKENS[None]).logits[0] - wanted).abs().max()) > 0.1
    spec = ServeSpec(
        model=str(BASE), adapter=str(tmp_path / "adapter"), authkey=b"k" * 16,
        parallel=ParallelConfig(tp=2, collective_timeout_s=100.0),
        engine=EngineConfig(kv_blocks=8, max_sequences=2),
    )  # fmt: skip
    for logits, left in ranks(2, _served, spec, free_address()):
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        assert left == [], "no branch is left beside the weights"


def test_a_folder_that_is_no_adapter_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", str(BASE), "--adapter", str(tmp_path), "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert "adapter_config.json cannot be read" in error and error.count("\n") == 1
