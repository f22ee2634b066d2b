"""A conversion holds one tensor at a time, whatever it reads: the 41 GB of the 20B model need no large machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

PROGRAM = Path(__file__).with_name("convert_memory.py")
ROOT = PROGRAM.parents[3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of 25 million parameters in both forms, 100 MB each; the largest tensor has 4 MB."""
    root = tmp_path_factory.mktemp("convert")
    config = GPTNeoXConfig(
        vocab_size=1024, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048
    )
    model = GPTNeoXForCausalLM._from_config(config)
    model.save_pretrained(root / "huggingface")
    step = root / "deepspeed"
    step.mkdir()
    (step / "config.json").write_text((root / "huggingface" / "config.json").read_text())
    layers = {
        0: {"word_embeddings.weight": model.gpt_neox.embed_in.weight.data},
        **{number + 2: block.state_dict() for number, block in enumerate(model.gpt_neox.layers)},
        11: {f"norm.{name}": value for name, value in model.gpt_neox.final_layer_norm.state_dict().items()},
        12: {"final_linear.weight": model.embed_out.weight.data},
    }
    for number, tensors in layers.items():
        torch.save(tensors, step / f"layer_{number:02d}-model_00-model_states.pt")
    return {"huggingface": root / "huggingface", "deepspeed": step}


@pytest.mark.parametrize("form", ["huggingface", "deepspeed"])
def test_a_conversion_takes_the_memory_of_a_few_tensors(folders: dict[str, Path], form: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folders[form]), str(tmp_path / "out"), "--from", form, "--dtype", "float16"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True, timeout=280,
    )  # fmt: skip
    seen = json.loads(done.stdout.splitlines()[-1])
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert seen["samples"] > 50 and seen["status"] == 0
    assert written > 50_000_000
    assert 2_000_000 < seen["peak"] < 25_000_000, f"{seen['peak'] / 1e6:.1f} MB"
