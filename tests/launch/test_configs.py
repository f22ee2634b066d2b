"""Every file in configs/ says something that the code accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.presets import CONFIGS, Layer, build, read
from launch.serving.serve_config import ServeConfig
from launch.training.train_config import TrainConfig
from tp_decoders.registry import FAMILIES, config_from_hf

PRESETS = sorted([*CONFIGS.glob("engine/*.yaml"), *CONFIGS.glob("cluster/*.yaml")])
TRAINING = sorted(CONFIGS.glob("training/*.yaml"))
MODELS = sorted(CONFIGS.glob("models/*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_preset_makes_a_configuration(path: Path) -> None:
    config = build(ServeConfig, [Layer("test", {"model": "m"}), read(path)])
    assert config != ServeConfig(model="m"), "it changes nothing"


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_training_preset_makes_a_run_of_a_corpus_and_a_folder(path: Path) -> None:
    given = Layer("test", {"out": "run", "corpus": {"path": "text.txt"}})
    config = build(TrainConfig, [read(path), given])
    assert config.steps > 0 and (config.model or config.scratch.preset)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_preset_is_a_model_this_project_reads(path: Path) -> None:
    assert config_from_hf(dict(read(path).values)).vocab_size > 0


def test_there_is_a_model_preset_of_every_family() -> None:
    assert {read(path).values["model_type"] for path in MODELS} == set(FAMILIES)


def test_everything_in_configs_is_covered() -> None:
    assert set(CONFIGS.rglob("*.yaml")) == {*PRESETS, *MODELS, *TRAINING}
