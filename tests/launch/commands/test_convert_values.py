"""`convert` changes values where it is asked to: a narrower type, whose losses are counted and overflow refused, and an
adapter, merged as PEFT merges it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from launch.main import main
from tests.tp_decoders.checkpoint.test_load import MODELS, write
from tp_decoders import load

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

WIDE, SMALL = "transformer.h.0.mlp.c_fc.weight", "transformer.wte.weight"


def write_extreme(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A GPT-2 of which float16 cannot hold four values: 3 too large, and 2 too small."""
    tensors = {name: tensor.to(dtype) for name, tensor in write(folder, "gpt2").items()}
    tensors[WIDE].view(-1)[:2] = 1e5
    tensors["transformer.ln_f.bias"][0] = -7e4
    tensors[SMALL].view(-1)[:2] = 1e-9
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overflow_is_counted_named_and_refused_unless_told(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = write_extreme(tmp_path / "in", dtype)
    words = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", "float16"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert (
        f"float16 cannot hold 3 values, which would become infinite (2 of {WIDE}, 1 of transformer.ln_f.bias)" in said
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert main([*words, "--allow-overflow"]) == 0
    said = capsys.readouterr().out
    assert "3 values became infinite" in said and "2 values too small for the type became 0" in said
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor.half()) for name, tensor in tensors.items())


def test_a_type_that_holds_all_values_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_extreme(tmp_path / "in")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert "note" not in capsys.readouterr().out


def test_infinities_that_were_there_are_no_overflow(tmp_path: Path) -> None:
    tensors = write(tmp_path / "in", "gpt2")
    tensors[WIDE][0, 0] = float("inf")
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", "float16"]) == 0


def test_loading_in_a_narrower_type_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_extreme(tmp_path)
    load(tmp_path)
    load(tmp_path, dtype=torch.bfloat16)
    assert caplog.text == ""
    load(tmp_path, dtype=torch.float16)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"in float16, rank 0: 3 values became infinite: 2 of {WIDE}" in warning.getMessage()


LORA: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    "gpt_neox": {"target_modules": ["query_key_value", "dense_4h_to_h", "embed_out"], "use_rslora": True},
    "mpt": {"target_modules": ["Wqkv"], "alpha_pattern": {"blocks.1.attn.Wqkv": 5}},
    "gpt_bigcode": {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"h.0.attn.c_attn": 2}},
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
}


@pytest.mark.parametrize("family", LORA)
def test_a_merged_adapter_is_what_peft_merges(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "base", family)
    torch.manual_seed(1)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **LORA[family]),
    )
    model.save_pretrained(tmp_path / "lora")
    words = ["convert", str(tmp_path / "base"), str(tmp_path / "out"), "--adapter", str(tmp_path / "lora")]
    assert main(words) == 0
    merged = model.merge_and_unload().state_dict()
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert ours.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    changed = {name for name, tensor in base.items() if not torch.equal(ours[name], tensor)}
    assert changed and all(
        any(end.split(".")[-1] in name for end in LORA[family]["target_modules"]) for name in changed
    )


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "base", "gpt2")
    peft.get_peft_model(MODELS["gpt_neox"](), peft.LoraConfig(target_modules=["dense"])).save_pretrained(
        tmp_path / "lora"
    )
    assert main(["convert", str(tmp_path / "base"), str(tmp_path / "out"), "--adapter", str(tmp_path / "lora")]) == 2
    assert "is no adapter of this model" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "base"), str(tmp_path / "out"), "--adapter", str(tmp_path / "base")]) == 2
    assert "adapter_config.json cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
