"""A float16 checkpoint is trained in a type that gradients fit into, and a line says so; or float16 is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch.main import main
from launch.serving.resolve_serve import trained_dtype
from parallel.errors import ConfigError
from tests.tp_decoders.checkpoint.test_load import write


def test_float16_weights_are_trained_in_float32_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = write(tmp_path, "gpt_neox")
    assert trained_dtype(tmp_path, None) is None and caplog.text == ""
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(halves | {"layers.0.attention.masked_bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert trained_dtype(tmp_path, None) == "float32"
    assert "is stored in float16, in which gradients underflow: it is trained in float32" in caplog.text
    assert trained_dtype(tmp_path, "bfloat16") == "bfloat16"
    with pytest.raises(ConfigError, match="parallel.dtype is 'float16', whose gradients underflow"):
        trained_dtype(tmp_path, "float16")


def test_serve_refuses_to_train_in_float16_before_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "gpt_neox")
    assert main(["serve", "--model", str(tmp_path), "--port", "0", "--train", "--dtype", "float16"]) == 2
    assert "parallel.dtype is 'float16', whose gradients underflow" in capsys.readouterr().err
