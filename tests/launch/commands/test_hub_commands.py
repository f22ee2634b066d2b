"""Every command that takes a folder takes a name of the Hugging Face hub: convert, plan, init, train and serve, from a
hub on this machine.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.main import main
from launch.presets import Layer
from launch.presets import build as build_settings
from launch.serving.resolve_serve import ResolvedServe
from launch.training.resolve_train import ResolvedTrain, resolve_train
from launch.training.train_config import TrainConfig
from tests.tp_decoders.hub.local_hub import LocalHub
from tests.tp_decoders.hub.test_repository import TOKENIZER_FOLDER, use
from tp_decoders import build, initialise, load, save
from tp_decoders.adapters.lora import attach
from tp_decoders.adapters.peft_files import save_adapter
from tp_decoders.hub.snapshot_cache import cached_of
from tp_decoders.model.lora_config import LoraConfig
from tp_decoders.registry import config_from_hf

ROOT = Path(__file__).resolve().parents[3]
SHAPE = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    model = initialise(build(config_from_hf(dict(SHAPE))))
    save(model, tmp_path / "model")
    shutil.copytree(TOKENIZER_FOLDER, tmp_path / "model", dirs_exist_ok=True)
    attach(model, LoraConfig())
    save_adapter(model, tmp_path / "lora")
    with LocalHub().running() as running:
        use(running, tmp_path / "cache", monkeypatch)
        running.add("org/model", tmp_path / "model")
        running.add("org/lora", tmp_path / "lora")
        yield running


def test_convert_reads_the_environment_that_huggingface_hub_reads(hub: LocalHub, tmp_path: Path) -> None:
    def convert(out: str, **more: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "launch", "convert", "org/model", str(tmp_path / out)]
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), **more}
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    done = convert("first")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "home" / "hub" / "models--org--model").is_dir()
    hub.asked.clear()
    done = convert("second", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and hub.asked == [], done.stderr
    for a, b in zip(load(tmp_path / "second").parameters(), load(tmp_path / "model").parameters(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "second" / "tokenizer.json").is_file()


def test_plan_and_init_take_names(hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", "--gpus", "2", "--gpu-memory", "1GB", "--device", "cpu", "--model"]
    assert main([*plan, "org/model"]) == 0
    assert "model: org/model" in capsys.readouterr().out
    assert hub.fetched() == ["config.json"]
    shape = tmp_path / "shape.yaml"
    shape.write_text("".join(f"{name}: {value}\n" for name, value in SHAPE.items()))
    assert main(["init", str(shape), str(tmp_path / "random"), "--tokenizer", "org/model"]) == 0
    assert (tmp_path / "random" / "tokenizer.json").is_file()
    assert main([*plan, "org/none"]) == 2
    assert "org/none is no folder here and no repository on" in capsys.readouterr().err


def resolved(settings: dict[str, Any]) -> ResolvedTrain:
    return resolve_train(build_settings(TrainConfig, [Layer("test", settings)]), logging.WARNING)


def test_a_training_run_begins_from_a_commit_of_the_hub(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words to train on " * 20)
    settings: dict[str, Any] = {
        "out": str(tmp_path / "run"), "model": "org/model", "steps": 1,
        "corpus": {"path": str(tmp_path / "text.txt"), "tokens_per_sample": 8, "batch_size": 1},
        "schedule": {"learning_rate": 0.001, "kind": "constant"},
    }  # fmt: skip
    cached = cached_of(resolved(settings).program.model)
    assert cached is not None and (cached.repo, cached.commit) == ("org/model", hub.refs["org/model"]["main"])
    scratch = {"preset": str(tmp_path / "shape.yaml"), "tokenizer": "org/model"}
    (tmp_path / "shape.yaml").write_text("".join(f"{name}: {value}\n" for name, value in SHAPE.items()))
    more = {name: value for name, value in settings.items() if name != "model"}
    program = resolved(more | {"out": str(tmp_path / "other"), "scratch": scratch}).program
    assert (Path(program.model) / "tokenizer.json").is_file()


def test_serve_finds_model_and_adapter_before_it_starts(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = []

    def serve(server: ResolvedServe, *_: object) -> int:
        begun.append(server.program)
        return 0

    monkeypatch.setattr("launch.serving.run_server.serve", serve)
    assert main(["serve", "--model", "org/model", "--adapter", "org/lora", "--port", "0"]) == 0
    found = [cached_of(begun[0].model), cached_of(str(begun[0].adapter))]
    assert [cached and cached.repo for cached in found] == ["org/model", "org/lora"]
    assert main(["serve", "--model", "org/model@v9"]) == 2
    assert "org/model on" in (text := capsys.readouterr().err) and "has no revision 'v9'" in text
